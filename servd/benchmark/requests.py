"""One request of a load, and what is done to a list of them: fresh first tokens, clipping, a hash.

Knows nothing of where requests come from or go to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

Prompt = tuple[int, ...] | str

NUM_FRESH = 2  # tokens (or words) replaced: with a thousand to choose from, two repetitions never meet by chance


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What is asked: a prompt of token ids or text, and the length of the answer."""

    id: str
    prompt: Prompt
    num_prompt_tokens: int  # of text an estimate
    output_tokens: int
    arrival_s: float = 0.0  # seconds after the start, for open loops
    group: str = ""  # requests of one group keep a common beginning; "" is a group of its own


def freshen(requests: Sequence[BenchRequest], salt: int) -> list[BenchRequest]:
    """The same requests with other first tokens, so that no earlier repetition's prefix cache answers.

    What replaces them is drawn from the requests' own tokens (or words) by `salt` and group: equal salts give equal
    requests, and what shared a prefix shares one still.
    """
    id_pool = sorted({i for r in requests if not isinstance(r.prompt, str) for i in r.prompt})
    word_pool = sorted({word for r in requests if isinstance(r.prompt, str) for word in r.prompt.split()})
    fresh: list[BenchRequest] = []
    for request in requests:
        rng = random.Random(f"{salt}:{request.group or 'id ' + request.id}")
        prompt = request.prompt
        if isinstance(prompt, str):
            words = prompt.split(" ")
            count = min(NUM_FRESH, len(words)) if word_pool else 0
            prompt = " ".join([*rng.choices(word_pool, k=count), *words[count:]])
        else:
            count = min(NUM_FRESH, len(prompt))
            prompt = (*rng.choices(id_pool, k=count), *prompt[count:])
        fresh.append(dataclasses.replace(request, prompt=prompt))
    return fresh


def clipped_lengths(num_prompt_tokens: int, output_tokens: int, limit: int) -> tuple[int, int]:
    """Lengths that fit `limit` tokens together: the answer keeps up to half of them, the prompt has the rest."""
    if num_prompt_tokens + output_tokens <= limit:
        return num_prompt_tokens, output_tokens
    output_tokens = min(output_tokens, max(limit // 2, 1))
    return min(num_prompt_tokens, max(limit - output_tokens, 1)), output_tokens


def clip_to_context(requests: Sequence[BenchRequest], limit: int) -> tuple[list[BenchRequest], int]:
    """The requests cut to `limit` tokens, and how many were cut; prompts keep their beginnings, so shared prefixes."""
    clipped = [_clip(request, limit) for request in requests]
    return clipped, sum(new != old for new, old in zip(clipped, requests, strict=True))


def _clip(request: BenchRequest, limit: int) -> BenchRequest:
    count, output_tokens = clipped_lengths(request.num_prompt_tokens, request.output_tokens, limit)
    prompt = request.prompt
    if count < request.num_prompt_tokens:
        if isinstance(prompt, str):
            words = prompt.split(" ")
            prompt = " ".join(words[: max(len(words) * count // request.num_prompt_tokens, 1)])
        else:
            prompt = prompt[:count]
    return dataclasses.replace(request, prompt=prompt, num_prompt_tokens=count, output_tokens=output_tokens)


def data_hash(requests: Sequence[BenchRequest]) -> str:
    """SHA-256 of prompts, lengths and arrivals, before they were freshened: equal hashes, equal work."""
    rows = [(r.prompt, r.output_tokens, round(r.arrival_s, 6), r.group) for r in requests]
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()
