"""Requests from a file of conversations: ShareGPT's shape, chat messages, or prompts with lengths; JSON or JSON lines.

Knows nothing of tokenizers but how to be handed one.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from servd.benchmark.corpus import CHARS_A_TOKEN
from servd.benchmark.requests import BenchRequest, Prompt
from servd.benchmark.workload import CHAT_OUTPUT, Lengths
from servd.errors import ConfigError

Tokenize = Callable[[list[str]], Awaitable[list[list[int]]]]
KNOWN = 'conversations ("from", "value"), messages ("role", "content"), or prompt (or prompt_token_ids), output_tokens'
ASKING = ("human", "user")
ANSWERING = ("gpt", "assistant", "chatgpt", "bing", "bard")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt of the file, and what is known of its answer."""

    prompt: Prompt
    answer: str | None = None
    output_tokens: int | None = None


class _Turn(msgspec.Struct, rename={"who": "from", "text": "value"}):
    who: str
    text: Any = None  # no str: a picture, a tool's call


class _Message(msgspec.Struct, rename={"who": "role", "text": "content"}):
    who: str
    text: Any = None


class _Entry(msgspec.Struct):
    conversations: list[_Turn] = []
    messages: list[_Message] = []
    prompt: str = ""
    prompt_token_ids: tuple[int, ...] = ()
    output_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None


def read_dataset(path: Path) -> list[Exchange]:
    """Each entry's first question and the answer to it. Raises ConfigError for a file of another shape."""
    decoder = msgspec.json.Decoder(_Entry)
    try:
        data = path.read_bytes()
        is_array = data.lstrip().startswith(b"[")
        entries = msgspec.json.decode(data, type=list[_Entry]) if is_array else decoder.decode_lines(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dataset {path}: {error}; allowed: entries with {KNOWN}") from None
    exchanges = [exchange for entry in entries if (exchange := _exchange(entry)) is not None]
    if not exchanges:
        raise ConfigError(f"--dataset {path} holds no question; allowed: entries with {KNOWN}")
    return exchanges


def _exchange(entry: _Entry) -> Exchange | None:
    """None for a conversation that does not begin with a question in words, and for an empty prompt."""
    if turns := entry.conversations or entry.messages:
        return _first_exchange([turn for turn in turns if turn.who != "system"])
    prompt = entry.prompt_token_ids or entry.prompt
    return Exchange(prompt, output_tokens=entry.output_tokens) if prompt else None


def _first_exchange(turns: Sequence[_Turn | _Message]) -> Exchange | None:
    texts = [turn.text if isinstance(turn.text, str) else "" for turn in turns[:2]]
    if not turns or turns[0].who not in ASKING or not texts[0].strip():
        return None
    has_answer = len(turns) > 1 and turns[1].who in ANSWERING
    return Exchange(texts[0], answer=texts[1] or None if has_answer else None)


async def dataset_requests(
    exchanges: Sequence[Exchange],
    num_requests: int,
    *,
    seed: int = 0,
    output_tokens: Lengths | None = None,
    as_ids: bool = True,
    tokenize: Tokenize | None = None,
) -> list[BenchRequest]:
    """`num_requests` of the exchanges, drawn by seed, in the file's order; all of them if there are no more.

    Answers are as long as the file's, unless `output_tokens` says otherwise; where the file has none, as a chat
    service's. Without `tokenize`, four characters count as a token.
    """
    rng = random.Random(f"dataset {seed}")
    picked = sorted(rng.sample(range(len(exchanges)), min(num_requests, len(exchanges))))
    chosen = [exchanges[i] for i in picked]
    prompts = await _token_ids([e.prompt if isinstance(e.prompt, str) else None for e in chosen], tokenize)
    answers = await _token_ids([e.answer if e.output_tokens is None else None for e in chosen], tokenize)
    requests: list[BenchRequest] = []
    for i, exchange, prompt_ids, answer_ids in zip(picked, chosen, prompts, answers, strict=True):
        prompt = exchange.prompt
        if isinstance(prompt, str) and as_ids and prompt_ids:
            prompt = tuple(prompt_ids)
        if output_tokens is not None:
            length = output_tokens.draw(rng)
        elif exchange.output_tokens is not None:
            length = exchange.output_tokens
        elif exchange.answer is not None:
            length = len(answer_ids) if answer_ids is not None else round(len(exchange.answer) / CHARS_A_TOKEN)
        else:
            length = CHAT_OUTPUT.draw(rng)
        num_prompt_tokens = len(prompt_ids) if prompt_ids is not None else _estimate(prompt)
        requests.append(BenchRequest(f"d{i}", prompt, num_prompt_tokens, max(length, 1)))
    return requests


def _estimate(prompt: Prompt) -> int:
    return max(round(len(prompt) / CHARS_A_TOKEN), 1) if isinstance(prompt, str) else len(prompt)


async def _token_ids(texts: Sequence[str | None], tokenize: Tokenize | None) -> list[list[int] | None]:
    """Ids of each text; None for no text, and for all of them without a tokenizer."""
    if tokenize is None:
        return [None] * len(texts)
    known = iter(await tokenize([text for text in texts if text]))
    return [next(known) if text else None for text in texts]
