"""Sampling settings as KServe's clients send them: vLLM's names, values perhaps as text.

Owns the list of names. Knows nothing of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from servd.api.chat.call import AnswerFormat
from servd.api.chat.tools import format_text
from servd.errors import InvalidRequestError, UnsupportedError
from servd.sampling_params import SamplingParams

MAX_PRIORITY = 1 << 31
MAX_SALT_CHARS = 256

_PATH = re.compile(r" - at `(?:key in `)?\$\.?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
_KINDS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}  # vLLM's → ours


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer must be, as vLLM's newer clients say it; exactly one is set."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What may be set; priority and timeout are the protocol's, all others are vLLM's."""

    priority: int = 0
    timeout: int | None = None  # microseconds
    cache_salt: str = ""
    truncate_prompt_tokens: int | None = None  # the last ones are kept; -1: as many as the context has room for
    triton_enable_empty_final_response: bool = False  # no effect: the last reply is never an empty one
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding: StructuredOutputs | None = None  # the next one's older name
    structured_outputs: StructuredOutputs | None = None

    def sampling_params(self, vocab_size: int, defaults: Mapping[str, Any]) -> SamplingParams:
        """The checked settings; `defaults` are the model's own. Raises InvalidRequestError naming the field."""
        if self.prompt_logprobs is not None:
            raise UnsupportedError(
                "prompt_logprobs is set; no output tensor could hold them", param="prompt_logprobs"
            )
        given: dict[str, Any] = {} if self.use_beam_search else {**defaults}  # which are for sampling
        given |= {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        given |= {name: tuple(given[name]) for name in _LISTS if name in given}
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if given.get("top_k") == -1:
            given["top_k"] = 0  # vLLM's -1 also keeps all
        params = SamplingParams(**given, guidance=self._guidance())
        params.validate(vocab_size)
        return params

    @property
    def guidance_param(self) -> str:
        """The field that asks for a grammar; if none does, one that could."""
        return next(iter(self._asked()), "structured_outputs")

    def _asked(self) -> dict[str, tuple[str, Any]]:
        """Field → (vLLM's word for the kind, what is asked), of all that ask for a grammar."""
        asked = {f"guided_{kind}": (kind, getattr(self, f"guided_{kind}")) for kind in _KINDS}
        for name in ("guided_decoding", "structured_outputs"):
            if (outer := getattr(self, name)) is not None:
                asked |= {f"{name}.{kind}": (kind, getattr(outer, kind)) for kind in (*_KINDS, "json_object")}
        return {name: one for name, one in asked.items() if one[1] is not None and one[1] is not False}

    def _guidance(self) -> str | None:
        asked = self._asked()
        if not asked:
            return None
        name = self.guidance_param
        if len(asked) > 1:
            raise InvalidRequestError(f"{' and '.join(asked)} are set; allowed: one of them", param=name)
        kind, value = asked[name]
        if kind == "json_object":
            return format_text(AnswerFormat("json_object", None, name))
        if kind == "json" and isinstance(value, str):
            value = json_object(value, name)
        return format_text(AnswerFormat(_KINDS[kind], value, name))  # type: ignore[arg-type]


_LISTS = ("stop_token_ids", "allowed_token_ids", "bad_words")
_SAMPLING = (
    "n", "best_of", "use_beam_search", "length_penalty", "early_stopping", "max_tokens", "min_tokens", "temperature",
    "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "include_stop_str_in_output", "ignore_eos", "seed", "logprobs", "skip_special_tokens", *_LISTS,
)  # fmt: skip


def settings_from(values: Mapping[str, Any]) -> Settings:
    """The settings of a request; numbers and truth values may be text. Raises InvalidRequestError naming the field."""
    for name in _SEQUENCE:
        if name in values:
            raise UnsupportedError(f"{name} is set; the model keeps no state between requests", param=name)
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise _named(str(error), values) from None
    except RecursionError:
        raise InvalidRequestError("sampling_parameters are nested too deeply", param="sampling_parameters") from None
    if abs(settings.priority) > MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority is {settings.priority}; allowed: {-MAX_PRIORITY} to {MAX_PRIORITY}", param="priority"
        )
    if settings.timeout is not None and settings.timeout < 1:
        raise InvalidRequestError(
            f"timeout is {settings.timeout}; allowed: at least 1 (microseconds)", param="timeout"
        )
    if len(settings.cache_salt) > MAX_SALT_CHARS:
        raise InvalidRequestError(
            f"cache_salt has {len(settings.cache_salt)} characters; allowed: at most {MAX_SALT_CHARS}",
            param="cache_salt",
        )
    kept = settings.truncate_prompt_tokens
    if kept is not None and kept != -1 and kept < 1:
        raise InvalidRequestError(
            f"truncate_prompt_tokens is {kept}; allowed: -1, or at least 1", param="truncate_prompt_tokens"
        )
    return settings


def json_object(text: object, param: str) -> dict[str, Any]:
    """A JSON object given as text or its bytes. Raises InvalidRequestError naming `param`, also for what is no text."""
    try:
        if not isinstance(text, str | bytes):
            raise InvalidRequestError(
                f"{param} is {repr(text)[:100]}; allowed: the text of a JSON object", param=param
            )
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise InvalidRequestError(f"{param} is not the text of a JSON object", param=param) from None


def _named(message: str, values: Mapping[str, Any]) -> InvalidRequestError:
    """msgspec's message, with the field first."""
    found = _PATH.search(message)
    path = found["path"] if found else ""
    fact = message[: found.start()] if found else message
    if unknown := _UNKNOWN.match(fact):
        name = f"{path}.{unknown['name']}"[-100:] if path else unknown["name"][:100]
        return InvalidRequestError(f"{name} is not a parameter that servd knows", param=name)
    field = re.split(r"[.\[]", path)[0] or "parameters"
    shown = repr(values.get(field))[:100]
    return InvalidRequestError(f"{field} is {shown}: {fact[0].lower()}{fact[1:]}", param=field)
