"""Parts of replies that several endpoints share: log-probabilities in three shapes, finish reasons.

Knows nothing of requests or streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from servd.engine.detokenizer import Detokenizer
from servd.engine.tokenizer import Tokenizer
from servd.outputs import TokenLogprobs
from servd.request import FinishReason

LEAST_LOGPROB = -9999.0  # OpenAI's number for "very unlikely": JSON has no -inf

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def json_reply(value: object) -> web.Response:
    """A 200 with `value` as JSON."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def finish_reason_text(reason: FinishReason | None) -> str | None:
    """OpenAI's word; None while the answer goes on. Failures never come here: they have an `error`."""
    return None if reason is None else _FINISH_REASONS[reason]


class CompletionLogprobs:
    """The legacy shape {tokens, token_logprobs, top_logprobs, text_offset}; keeps the offset of one answer's text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, prompt: Detokenizer, answer: Detokenizer) -> None:
        """The detokenizers tell how much a token adds to the text: not always what it says itself."""
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._prompt = prompt
        self._answer = answer
        self._offset = 0  # characters of the text before the next token

    def as_dict(
        self,
        prompt: Sequence[TokenLogprobs | None],
        answer: Sequence[TokenLogprobs],
        *,
        first_token_id: int,
        hides_first: bool = False,
    ) -> dict[str, Any]:
        """The next tokens, of an echoed prompt and of the answer.

        An entry of None is the prompt's first token, `first_token_id`, which nothing predicts; `hides_first`: the
        echoed text is without it.
        """
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offset: list[int] = []
        parts = [(entry, self._prompt) for entry in prompt] + [(entry, self._answer) for entry in answer]
        for entry, detokenizer in parts:
            token_id = first_token_id if entry is None else entry.token_id
            tokens.append(self._tokenizer.token_text(token_id))
            text_offset.append(self._offset)
            self._offset += len(detokenizer.push([] if entry is None and hides_first else [token_id]))
            token_logprobs.append(None if entry is None else _finite(entry.logprob))
            top_logprobs.append(None if entry is None else self._top(entry))
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in _top_entries(entry, self._num_top):
            top.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        top.setdefault(self._tokenizer.token_text(entry.token_id), _finite(entry.logprob))
        return top


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], num_top: int) -> dict[str, Any]:
    """The shape of chat completions: {"content": [{token, logprob, bytes, top_logprobs}]}."""
    return {
        "content": [
            _chat_token(tokenizer, entry.token_id, entry.logprob)
            | {"top_logprobs": [_chat_token(tokenizer, i, logprob) for i, logprob in _top_entries(entry, num_top)]}
            for entry in entries
        ],
        "refusal": None,
    }


def vllm_prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token {id: {logprob, rank, decoded_token}} of it and the best ones."""
    shown: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            shown.append(None)
            continue
        ranked = [(i, logprob, rank) for rank, (i, logprob) in enumerate(_top_entries(entry, num_top), start=1)]
        shown.append(
            {
                str(i): {"logprob": _finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(i)}
                for i, logprob, rank in [(entry.token_id, entry.logprob, entry.rank), *ranked]
            }
        )
    return shown


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _top_entries(entry: TokenLogprobs, num_top: int) -> list[tuple[int, float]]:
    return list(zip(entry.top_token_ids, entry.top_logprobs, strict=True))[:num_top]


def _finite(logprob: float) -> float:
    # Written so that NaN is caught too.
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB
