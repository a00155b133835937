"""How one request is sampled: the fields, their ranges, and the check of both.

Knows nothing of where the values came from (HTTP, gRPC, Python) nor of how sampling is done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NoReturn

import msgspec

from servd.errors import InvalidRequestError, UnsupportedError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_N = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 128
POOLINGS = ("last", "mean", "cls")
MAX_LENGTH_PENALTY = 10.0

# Settings that beam search, which looks at the model's own log-probabilities, cannot honour; and what changes nothing.
_NEUTRAL_FOR_BEAMS: dict[str, tuple[object, ...]] = {
    "temperature": (0.0, 1.0),
    "top_p": (1.0,),
    "top_k": (0,),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None, {}),
    "stop": ((), []),
    "allowed_token_ids": (None,),
    "bad_words": ((), []),
    "guidance": (None,),
}


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling settings of one request; the names are vLLM's. `validate()` checks ranges.

    n: answers to the same prompt. max_tokens: longest answer (None: what the context allows). min_tokens: end-of-text
    and stop ids are held back until so many tokens are there. temperature: 0 is greedy. top_k: 0 keeps all. logprobs:
    how many of the best alternatives to report with each token (None: no logprobs). prompt_logprobs: the same for
    the prompt's tokens. seed: the draw at position p depends on (seed, p) alone. best_of: so many answers are written,
    and the n with the highest log-probability per token returned, all at the end. use_beam_search: the n best answers
    of a search with best_of (or n) beams, as transformers' `generate` finds them; score: log-probability divided by
    length ** length_penalty; early_stopping: false, true or "never", see servd.engine.beams.

    guidance: the answer ends where its grammar does. min_tokens and ignore_eos hold back its end only while the grammar
    leaves a choice; stop strings and stop ids end it wherever they come. bad_words: compared byte by byte, within
    longer words too.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    shown_special_token_ids: tuple[int, ...] = ()  # which are not skipped all the same
    allowed_token_ids: tuple[int, ...] | None = None  # no other token is sampled
    bad_words: tuple[str, ...] = ()  # texts that the answer never holds
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    guidance: str | None = None  # a grammar that the answer follows; see servd.engine.guidance
    pooling: str | None = None  # the prompt's hidden states become one vector (last, mean, cls); nothing is sampled

    @property
    def needs_every_position(self) -> bool:
        """Whether all of the prompt must be computed, however much of it is cached."""
        return self.prompt_logprobs is not None or self.pooling in ("mean", "cls")

    @property
    def num_sequences(self) -> int:
        """Answers that are written, or beams that are followed, at once."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_sequences_param(self) -> str:
        """The field that says how many these are."""
        return "n" if self.best_of is None else "best_of"

    @property
    def is_constrained(self) -> bool:
        """Whether some tokens are ruled out at each step, by a mask that the worker makes while the model runs."""
        return self.guidance is not None or self.allowed_token_ids is not None or bool(self.bad_words)

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidRequestError naming the first field out of its range."""
        _check_int("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 0, 1 << 31)
        _check_int("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _fail("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check_int("top_k", self.top_k, 0, 1 << 31)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above_low=True)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None:
                _check_int(name, count, 0, MAX_LOGPROBS)
        self._validate_pooling()
        self._validate_stops(vocab_size)
        self._validate_logit_bias(vocab_size)
        self._validate_constraints(vocab_size)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "use_beam_search"):
            if not isinstance(getattr(self, name), bool):
                _fail(name, repr(getattr(self, name)), "true or false")
        if self.best_of is not None:
            _check_int("best_of", self.best_of, self.n, MAX_N)
        self._validate_beams(vocab_size)

    def _validate_beams(self, vocab_size: int) -> None:
        _check_float("length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            _fail("early_stopping", repr(self.early_stopping), 'true, false or "never"')
        if not self.use_beam_search:
            for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != default:
                    _fail(name, repr(getattr(self, name)), f"{default!r}, unless use_beam_search is true")
            return
        if 2 * self.num_sequences > vocab_size:
            _fail(self.num_sequences_param, self.num_sequences, f"at most {vocab_size // 2} beams with this vocabulary")
        if self.max_tokens == 0:
            _fail("max_tokens", 0, "at least 1 with use_beam_search")
        for name, neutral in _NEUTRAL_FOR_BEAMS.items():
            if getattr(self, name) not in neutral:
                numbers = " or ".join(f"{value:g}" for value in neutral if isinstance(value, (int, float)))
                shown = repr(getattr(self, name))[:100] if numbers else "set"
                raise UnsupportedError(
                    f"{name} is {shown}; allowed with use_beam_search: {numbers or 'to leave it out'}", param=name
                )

    def _validate_pooling(self) -> None:
        if self.pooling is None:
            return
        if self.pooling not in POOLINGS:
            _fail("pooling", repr(self.pooling), ", ".join(POOLINGS))
        if self.max_tokens != 0 or self.n != 1:
            _fail("pooling", repr(self.pooling), "with max_tokens 0 and n 1")

    def _validate_logit_bias(self, vocab_size: int) -> None:
        biases: object = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(biases, dict):
            _fail("logit_bias", repr(biases), "a map from token ids to biases")
        if len(biases) > MAX_LOGIT_BIASES:
            _fail("logit_bias", f"{len(biases)} biases", f"at most {MAX_LOGIT_BIASES} biases")
        for token_id, bias in biases.items():
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                _fail("logit_bias", repr(token_id), f"token ids from 0 to {vocab_size - 1}")
            _check_float(f"logit_bias.{token_id}", bias, -100.0, 100.0)

    def _validate_constraints(self, vocab_size: int) -> None:
        if self.guidance is not None and (not isinstance(self.guidance, str) or not is_utf8(self.guidance)):
            _fail("guidance", repr(self.guidance)[:100], "a grammar as text (see servd.engine.guidance)")
        allowed = self.allowed_token_ids
        if allowed is not None:
            if not isinstance(allowed, (list, tuple)) or not 0 < len(allowed) <= vocab_size:
                kind = f"{len(allowed)} ids" if isinstance(allowed, (list, tuple)) else repr(allowed)[:100]
                _fail("allowed_token_ids", kind, f"a list of 1 to {vocab_size} token ids")
            _check_token_ids("allowed_token_ids", allowed, vocab_size)
        if not isinstance(self.bad_words, (list, tuple)):
            _fail("bad_words", repr(self.bad_words)[:100], "a list of strings")
        if len(self.bad_words) > MAX_BAD_WORDS:
            _fail("bad_words", f"{len(self.bad_words)} strings", f"at most {MAX_BAD_WORDS} strings")
        for text in self.bad_words:
            if not isinstance(text, str) or not is_utf8(text):
                _fail("bad_words", repr(text)[:100], "strings of valid Unicode")
            if not 0 < len(text) <= MAX_BAD_WORD_CHARS:
                _fail("bad_words", f"a string of {len(text)} characters", f"1 to {MAX_BAD_WORD_CHARS} characters")

    def _validate_stops(self, vocab_size: int) -> None:
        for name, items in (("stop", "strings"), ("stop_token_ids", "token ids")):
            if not isinstance(getattr(self, name), (list, tuple)):  # of "END", each letter would stop
                _fail(name, repr(getattr(self, name)), f"a list of {items}")
        for text in self.stop:
            if not isinstance(text, str) or not is_utf8(text):
                _fail("stop", repr(text), "strings of valid Unicode")
        if len(self.stop) > MAX_STOP_STRINGS:
            _fail("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        if any(not text for text in self.stop):
            _fail("stop", "''", "strings that are not empty")
        longest = max(map(len, self.stop), default=0)
        if longest > MAX_STOP_CHARS:
            _fail("stop", f"a string of {longest} characters", f"at most {MAX_STOP_CHARS} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            _fail("stop_token_ids", f"{len(self.stop_token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
        _check_token_ids("stop_token_ids", self.stop_token_ids, vocab_size)


def is_utf8(text: str) -> bool:
    """Whether the text can be encoded: one with a lone surrogate cannot be sent to a worker process."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_token_ids(name: str, token_ids: Sequence[object], vocab_size: int) -> None:
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            _fail(name, repr(token_id)[:100], f"token ids from 0 to {vocab_size - 1}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _fail(name, repr(value), "an integer")
    elif not low <= value <= high:
        _fail(name, value, f"{low} to {high}")


def _check_float(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> None:
    allowed = f"{'above ' if above_low else ''}{low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        _fail(name, repr(value), f"a finite number, {allowed}")
    elif not low <= value <= high or (above_low and value == low):
        _fail(name, value, allowed)


def _fail(name: str, value: object, allowed: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is {value}; allowed: {allowed}", param=name.split(".")[0])
