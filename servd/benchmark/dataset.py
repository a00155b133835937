"""Requests from a file of conversations: ShareGPT's shape, chat messages, or prompts with lengths; JSON or JSON lines.

Knows nothing of tokenizers but how to be handed one.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from servd.benchmark.corpus import CHARS_A_TOKEN
from servd.benchmark.requests import BenchRequest, Prompt
from servd.benchmark.workload import CHAT_OUTPUT, Lengths
from servd.errors import ConfigError

Tokenize = Callable[[list[str]], Awaitable[list[list[int]]]]
KNOWN = 'conversations ("from", "value"), messages ("role", "content"), or prompt (or prompt_token_ids), output_tokens'
_JSON = msgspec.json.Decoder()
ASKING = ("human", "user")
ANSWERING = ("gpt", "assistant", "chatgpt", "bing", "bard")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt of the file, and what is known of its answer."""

    prompt: Prompt
    answer: str | None = None
    output_tokens: int | None = None


def read_dataset(path: Path) -> list[Exchange]:
    """Each entry's first question and the answer to it. Raises ConfigError for a file of another shape."""
    try:
        data = path.read_bytes()
        is_array = data.lstrip().startswith(b"[")
        entries = _JSON.decode(data) if is_array else _JSON.decode_lines(data)
        exchanges = [exchange for entry in entries if (exchange := _exchange(entry)) is not None]
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"--dataset {path}: {detail}; allowed: entries with {KNOWN}") from None
    if not exchanges:
        raise ConfigError(f"--dataset {path} holds no question; allowed: entries with {KNOWN}")
    return exchanges


def _exchange(entry: dict[str, Any]) -> Exchange | None:
    """None for a conversation that does not begin with a question and its answer."""
    if "conversations" in entry:
        return _first_exchange([(turn["from"], turn["value"]) for turn in entry["conversations"]])
    if "messages" in entry:
        return _first_exchange([(turn["role"], turn["content"]) for turn in entry["messages"]])
    prompt = tuple(map(int, entry["prompt_token_ids"])) if "prompt_token_ids" in entry else str(entry["prompt"])
    output_tokens = entry.get("output_tokens")
    if output_tokens is not None and not (isinstance(output_tokens, int) and output_tokens > 0):
        raise ValueError(f"output_tokens is {output_tokens!r}")
    return Exchange(prompt, output_tokens=output_tokens) if prompt else None


def _first_exchange(turns: Sequence[tuple[str, str]]) -> Exchange | None:
    spoken = [(who, text) for who, text in turns if who != "system"]
    if not spoken or spoken[0][0] not in ASKING or not spoken[0][1].strip():
        return None
    has_answer = len(spoken) > 1 and spoken[1][0] in ANSWERING
    return Exchange(spoken[0][1], answer=spoken[1][1] if has_answer else None)


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
