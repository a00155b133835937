"""Transport-neutral service: what HTTP and gRPC both call, on one engine.

Owns the model's name and request ids. Knows nothing of JSON, protobuf, SSE or status codes.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any

import msgspec

from servd.api.access import current_caller
from servd.api.chat.formats import ChatFormats, ParserChoice
from servd.engine.async_engine import AsyncEngine, EngineStats
from servd.engine.embeddings import Embedding, check_dimensions, embed_all, pooling_params
from servd.engine.prefix_pins import DEFAULT_TTL_SECONDS, PrefixPin
from servd.engine.result_stream import ResultStream
from servd.errors import InvalidRequestError, NotFoundError
from servd.outputs import RequestOutput
from servd.request import FinishReason
from servd.sampling_params import SamplingParams

MAX_TOKENIZE_CHARS = 1 << 20  # of a text that need not fit the context
MAX_DETOKENIZE_TOKENS = 1 << 18
REQUEST_ID_SHAPE = re.compile(r"[A-Za-z0-9._-]{1,128}")  # of one that a client gives: it goes to logs and headers

# Not an argument, so that every dialect's requests are found by it.
_call_id: ContextVar[str] = ContextVar("servd_call_id", default="")


def set_call_id(call_id: str) -> None:
    """Called by a transport, in the task of each call: what its client knows it by, besides the ids of its answers."""
    _call_id.set(call_id)


class InferenceService:
    """One served model. Errors are ServdErrors; their `param` names the field to blame."""

    def __init__(
        self,
        engine: AsyncEngine,
        model_name: str,
        *,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> None:
        """The parsers' names, "auto" (what the chat template tells) or "none". Raises ConfigError for unknown ones."""
        self.engine = engine
        self.model_name = model_name
        self._choice = ParserChoice(tool_call_parser, reasoning_parser)
        self.created = int(time.time())

    @cached_property
    def chat_formats(self) -> ChatFormats:
        """How the model writes tool calls and thoughts. Raises EngineUnavailableError before the engine has started."""
        return ChatFormats.of(self.engine.tokenizer, self._choice)

    async def load_chat_formats(self) -> ChatFormats:
        """The same; the first time off the event loop, for the template is tried out, which may take it a while."""
        if "chat_formats" not in self.__dict__:
            await self.engine.run_in_thread(lambda: self.chat_formats)
        return self.chat_formats

    def check_model(self, name: str | None) -> None:
        """Raise NotFoundError unless `name` is the served model (None and "" mean: the one there is).

        A caller with a scope hears the same of models that do not exist and of those that it may not use.
        """
        if not current_caller().may_use(self.model_name):
            raise NotFoundError(f"model {name!r} does not exist, or this API key may not use it", param="model")
        if name and name != self.model_name:
            raise NotFoundError(f"model {name!r} does not exist; served here: {self.model_name!r}", param="model")

    def check_num_prompts(self, count: int, *, param: str = "prompt") -> None:
        """Raise InvalidRequestError for more prompts than the caller may ever have in work: to try again is no use."""
        limits = current_caller().limits
        if limits is not None and limits.max_concurrent is not None and count > limits.max_concurrent:
            raise InvalidRequestError(
                f"{param} has {count} prompts; allowed with this key: {limits.max_concurrent} at once", param=param
            )

    def new_request_id(self, prefix: str) -> str:
        """A fresh id such as 'cmpl-5f0c…'."""
        return f"{prefix}-{uuid.uuid4().hex}"

    async def encode_prompt(
        self, prompt: str | Sequence[int], *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of a prompt given as text or ids, made off the event loop. Raises InvalidRequestError."""
        if isinstance(prompt, str):
            await self._check_fits(len(prompt), param)
        encode = partial(self.engine.inputs.encode_prompt, add_special_tokens=add_special_tokens, param=param)
        return await self.engine.run_in_thread(encode, prompt)

    def num_kept_tokens(self, asked: int | None, max_tokens: int | None) -> int | None:
        """How many of a prompt's last tokens are kept; None: all. Asked for -1: what leaves room for the answer."""
        if asked != -1:
            return asked
        return max(self.engine.max_model_len - (1 if max_tokens is None else max_tokens), 1)

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, rendered in a sandbox off the event loop. Raises InvalidRequestError."""
        calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
        num_chars = sum(len(message["content"]) for message in messages)
        num_chars += sum(len(msgspec.json.encode(shown)) for shown in (*calls, *(tools or ())))
        await self._check_fits(num_chars, "messages")
        encode = partial(
            self.engine.inputs.encode_chat,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            tools=tools,
        )
        return await self.engine.run_in_thread(encode, messages)

    async def _check_fits(self, num_chars: int, param: str) -> None:
        """Raise InvalidRequestError for a text that is too long however it is cut into tokens.

        Tokenizing megabytes takes seconds and a hundred times their memory, only to find the same.
        """
        limit = self.engine.max_model_len
        if num_chars > limit and num_chars > limit * await self.engine.run_in_thread(lambda: self._longest_token):
            raise InvalidRequestError(
                f"{param}: {num_chars} characters are too many; allowed: at most {limit - 1} tokens, so that one more "
                f"fits the context of {limit}; none has more than {self._longest_token} bytes",
                param=param,
            )

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of the longest token in the vocabulary."""
        tokenizer = self.engine.tokenizer
        return max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
        prompt_param: str = "prompt",
    ) -> ResultStream:
        """Start a request; all checks happen in this call, before a token is awaited.

        The stream yields RequestOutputs of all `params.n` answers (see `index`) until each has a finish_reason;
        closing it aborts what is unfinished. `timeout` in seconds. Raises InvalidRequestError, OverloadedError,
        EngineUnavailableError; what fails later arrives as an output with `error` set.

        Whatever the dialect, the caller's scope and limits hold here (NotFoundError, RateLimitedError), and its tenant
        is part of the salt.
        """
        caller = current_caller()
        self.check_model(self.model_name)
        charge = None
        if caller.limits is not None:
            charge = caller.limits.begin(len(prompt_token_ids), params.n, params.num_sequences)
        try:
            stream = self.engine.generate(
                prompt_token_ids, params, request_id=request_id, priority=priority, timeout=timeout,
                cache_salt=caller.cache_salt(cache_salt), prompt_param=prompt_param,
            )  # fmt: skip
        except BaseException:
            if charge is not None:
                charge.refund()
            raise
        if charge is not None:
            stream.on_output = charge.take
        self.engine.request_log.claim(request_id, tenant=caller.tenant, alias=_call_id.get())
        return stream

    async def embed(
        self,
        prompts: Sequence[list[int]],
        *,
        request_id: str,
        pooling: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
        prompt_params: Sequence[str] = ("input",),
    ) -> list[Embedding]:
        """One vector a prompt (token ids), in order; many run in one batch. Nothing is started before all are checked.

        pooling: last, mean or cls; None: `--embedding-pooling`. dimensions: only the first so many values.
        normalize: to length 1, after the cut. timeout: seconds for all of them. prompt_params: what errors call each
        prompt, or all. Raises what `generate` raises, DeadlineExceededError and RequestFailedError.
        """
        engine = self.engine
        params = pooling_params(engine.config.model.embedding_pooling if pooling is None else pooling)
        check_dimensions(dimensions, engine.info.hidden_size)
        names = list(prompt_params) * len(prompts) if len(prompt_params) == 1 else prompt_params
        for token_ids, name in zip(prompts, names, strict=True):
            engine.inputs.check(len(token_ids), params, prompt_param=name)
            await asyncio.sleep(0)  # thousands may come at once: others run between
        deadline = None if timeout is None else time.monotonic() + timeout

        def start(number: int) -> ResultStream:
            return self.generate(
                prompts[number], params,
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{number}",
                priority=priority, timeout=None if deadline is None else deadline - time.monotonic(),
                cache_salt=cache_salt, prompt_param=names[number],
            )  # fmt: skip

        limit = min(engine.config.scheduler.max_num_seqs, engine.config.scheduler.max_num_queued_reqs)
        limits = current_caller().limits
        if limits is not None and limits.max_concurrent is not None:
            limit = min(limit, limits.max_concurrent)
        return await embed_all(start, len(prompts), num_at_once=limit, dimensions=dimensions, normalize=normalize)

    async def create_prefix(
        self,
        token_ids: list[int],
        *,
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        name: str | None = None,
        cache_salt: str = "",
        prompt_param: str = "prompt",
    ) -> PrefixPin:
        """Compute a prefix and keep its KV blocks for the caller's tenant; see PrefixPins.create."""
        caller = current_caller()
        self.check_model(self.model_name)
        self.engine.inputs.check(len(token_ids), SamplingParams(max_tokens=0), prompt_param=prompt_param)
        charge = None if caller.limits is None else caller.limits.begin(len(token_ids), 1)
        try:
            return await self.engine.pins.create(
                token_ids, tenant=caller.tenant, cache_salt=caller.cache_salt(cache_salt), ttl_seconds=ttl_seconds,
                name=name, prompt_param=prompt_param,
            )  # fmt: skip
        finally:
            if charge is not None:
                charge.take(RequestOutput("", 0, finish_reason=FinishReason.LENGTH))

    def list_prefixes(self) -> list[PrefixPin]:
        """The caller's tenant's, oldest first."""
        return self.engine.pins.of_tenant(current_caller().tenant)

    def get_prefix(self, pin_id: str) -> PrefixPin:
        """Raises UnknownPrefixError, also for another tenant's."""
        return self.engine.pins.get(pin_id, current_caller().tenant)

    def delete_prefix(self, pin_id: str) -> None:
        """Let go of it. Raises UnknownPrefixError."""
        self.engine.pins.delete(pin_id, current_caller().tenant)

    def describe_request(self, name: str) -> dict[str, Any]:
        """Why it was slow: by the id of its answer, or the call's. Raises UnknownRequestError, also for others'."""
        return self.engine.request_log.describe(name, current_caller().tenant)

    def list_requests(self, *, state: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """Ids, states and ages of the caller's tenant's requests, newest first."""
        return self.engine.request_log.overview(current_caller().tenant, state=state, limit=limit)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of a text, which may be empty, and longer than the context. Raises InvalidRequestError."""
        if len(text) > MAX_TOKENIZE_CHARS:
            raise InvalidRequestError(
                f"{param} has {len(text)} characters; allowed here: at most {MAX_TOKENIZE_CHARS}", param=param
            )
        return await self.engine.run_in_thread(self.engine.tokenizer.encode, text, add_special_tokens)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, param: str = "tokens"
    ) -> str:
        """Text of token ids. Raises InvalidRequestError for ids out of the vocabulary, or too many."""
        if len(token_ids) > MAX_DETOKENIZE_TOKENS:
            raise InvalidRequestError(
                f"{param} has {len(token_ids)} ids; allowed: at most {MAX_DETOKENIZE_TOKENS}", param=param
            )
        check, decode = self.engine.inputs.check_token_ids, self.engine.tokenizer.decode

        def checked_text() -> str:
            check(token_ids, param)
            return decode(token_ids, skip_special_tokens)

        return await self.engine.run_in_thread(checked_text)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's text alone; a part of a character shows as U+FFFD."""
        token_text = self.engine.tokenizer.token_text
        return await self.engine.run_in_thread(lambda: [token_text(i) for i in token_ids])

    def stats(self) -> EngineStats:
        """Queue lengths and KV use now."""
        return self.engine.stats()
