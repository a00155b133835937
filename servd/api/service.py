"""Transport-neutral service: what HTTP and gRPC both call, on one engine.

Owns the model's name and request ids. Knows nothing of JSON, protobuf, SSE or status codes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from servd.engine.async_engine import AsyncEngine, EngineStats
from servd.engine.result_stream import ResultStream
from servd.errors import NotFoundError
from servd.sampling_params import SamplingParams


class InferenceService:
    """One served model. Errors are ServdErrors; their `param` names the field to blame."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self.engine = engine
        self.model_name = model_name
        self.created = int(time.time())

    def check_model(self, name: str | None) -> None:
        """Raise NotFoundError unless `name` is the served model (None and "" mean: the one there is)."""
        if name and name != self.model_name:
            raise NotFoundError(f"model {name!r} does not exist; served here: {self.model_name!r}", param="model")

    def new_request_id(self, prefix: str) -> str:
        """A fresh id such as 'cmpl-5f0c…'."""
        return f"{prefix}-{uuid.uuid4().hex}"

    async def encode_prompt(
        self, prompt: str | Sequence[int], *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of a prompt given as text or ids, made off the event loop. Raises InvalidRequestError."""
        encode = partial(self.engine.inputs.encode_prompt, add_special_tokens=add_special_tokens, param=param)
        return await self.engine.run_in_thread(encode, prompt)

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, rendered in a sandbox off the event loop. Raises InvalidRequestError."""
        encode = partial(
            self.engine.inputs.encode_chat, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs
        )
        return await self.engine.run_in_thread(encode, messages)

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
        """
        return self.engine.generate(
            prompt_token_ids, params, request_id=request_id, priority=priority, timeout=timeout,
            cache_salt=cache_salt, prompt_param=prompt_param,
        )  # fmt: skip

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, which may be empty."""
        return await self.engine.run_in_thread(self.engine.tokenizer.encode, text, add_special_tokens)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, param: str = "tokens"
    ) -> str:
        """Text of token ids. Raises InvalidRequestError for ids out of the vocabulary."""
        self.engine.inputs.check_token_ids(token_ids, param)
        return await self.engine.run_in_thread(self.engine.tokenizer.decode, list(token_ids), skip_special_tokens)

    def stats(self) -> EngineStats:
        """Queue lengths and KV use now."""
        return self.engine.stats()
