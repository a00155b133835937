"""From a caller's prompt to trusted token ids, and the check of a request against the model's limits.

Owns every check of a request's values. Knows nothing of transports; runs in any thread, but for grammars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from servd.engine.guidance import GuidanceChecker
from servd.engine.tokenizer import Tokenizer
from servd.errors import InvalidRequestError
from servd.sampling_params import SamplingParams, is_utf8


class InputProcessor:
    """Checks and tokenizes for one model. All errors are InvalidRequestErrors naming the field."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, tokenizer_path: Path) -> None:
        """`tokenizer_path`: of the tokenizer.json that grammars are checked with, if there is one."""
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._guidance = GuidanceChecker(tokenizer_path, tokenizer.vocab_size, tokenizer.eos_token_ids)

    def encode_prompt(
        self, prompt: str | Sequence[int], *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of a prompt given as text, or the ids themselves after a check; never empty."""
        if isinstance(prompt, str):
            if not is_utf8(prompt):
                raise InvalidRequestError(f"{param} holds a lone surrogate; allowed: valid Unicode", param=param)
            token_ids = self._tokenizer.encode(prompt, add_special_tokens)
        else:
            try:
                token_ids = list(prompt)
            except TypeError:
                kind = type(prompt).__name__
                raise InvalidRequestError(f"{param} is {kind}; allowed: text or token ids", param=param) from None
            self.check_token_ids(token_ids, param)
        self.check_not_empty(token_ids, param)
        return token_ids

    def check_not_empty(self, token_ids: Sequence[int], param: str) -> None:
        """Raise unless a prompt has a token."""
        if not token_ids:
            raise InvalidRequestError(f"{param} is empty; allowed: at least one token", param=param)

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raise unless every id is one of the vocabulary, and an int: no other kind reaches a worker process."""
        vocab_size = self._tokenizer.vocab_size
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"{param} holds token id {token_id!r}; allowed: 0 to {vocab_size - 1} (int)", param=param
                )

    def check_request_id(self, request_id: str) -> None:
        """Raise unless the id is text that can be sent to a worker process."""
        if not isinstance(request_id, str) or not is_utf8(request_id):
            raise InvalidRequestError(f"request_id is {request_id!r}; allowed: valid Unicode", param="request_id")

    def check_beams(self, params: SamplingParams, max_num_seqs: int) -> None:
        """Raise if a search has more beams than requests can run at once: some would wait in each of its steps."""
        if params.use_beam_search and params.num_sequences > max_num_seqs:
            field = params.num_sequences_param
            raise InvalidRequestError(
                f"{field} is {params.num_sequences}; allowed with use_beam_search: at most --max-num-seqs "
                f"({max_num_seqs})",
                param=field,
            )

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template; special tokens in its texts stay plain text."""
        if not messages:
            raise InvalidRequestError("messages is empty; allowed: at least one message", param="messages")
        token_ids = self._tokenizer.encode_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            tools=tools,
        )
        if not token_ids:
            raise InvalidRequestError("messages give an empty prompt under the chat template", param="messages")
        return token_ids

    async def check_guidance(self, params: SamplingParams, param: str) -> None:
        """Raise, blaming `param`, unless answers can follow the grammar that `params` may have. On the loop only.

        A grammar seen lately is judged at once, another one in a thread. Raises OverloadedError if too many wait.
        """
        if params.guidance is not None:
            params.validate(self._tokenizer.vocab_size)
            await self._guidance.check(params.guidance, param)

    def require_checked_guidance(self, params: SamplingParams) -> None:
        """Raise unless `check_guidance` has let the grammar of `params` pass, if it has one."""
        if params.guidance is not None:
            self._guidance.require(params.guidance, "guidance")

    def close(self) -> None:
        """Stop judging grammars."""
        self._guidance.close()

    def check(self, num_prompt_tokens: int, params: SamplingParams, *, prompt_param: str = "prompt") -> None:
        """Raise unless the parameters are in range and prompt and answer fit the context."""
        params.validate(self._tokenizer.vocab_size)
        limit = self._max_model_len
        if num_prompt_tokens > limit or (num_prompt_tokens == limit and params.max_tokens != 0):
            raise InvalidRequestError(
                f"{prompt_param} has {num_prompt_tokens} tokens; allowed: at most {limit - 1}, so that one more fits "
                f"the context of {limit}",
                param=prompt_param,
            )
        if params.max_tokens is not None and num_prompt_tokens + params.max_tokens > limit:
            raise InvalidRequestError(
                f"max_tokens is {params.max_tokens}; allowed: at most {limit - num_prompt_tokens} after "
                f"{num_prompt_tokens} prompt tokens in a context of {limit}",
                param="max_tokens",
            )
