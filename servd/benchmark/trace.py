"""Requests with the arrivals and lengths of a recorded trace: Azure's CSV, or Mooncake's JSONL with its shared blocks.

Knows formats by their content. The text is the corpus': traces hold none.
"""

from __future__ import annotations

import csv
import datetime
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from servd.benchmark.corpus import Corpus, join
from servd.benchmark.requests import BenchRequest, Prompt, clipped_lengths
from servd.errors import ConfigError

BLOCK_TOKENS = 512  # tokens that one of Mooncake's hash ids stands for
KNOWN = "a CSV with TIMESTAMP, ContextTokens, GeneratedTokens (Azure), or JSON lines with timestamp, input_length, \
output_length, hash_ids (Mooncake)"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A line of a trace."""

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # what the prompt's blocks of BLOCK_TOKENS hold; equal ids, equal tokens


class _MooncakeLine(msgspec.Struct):
    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, limit: int | None = None) -> list[Arrival]:
    """The first `limit` lines, the earliest at 0 s. Raises ConfigError for what is none of the known formats."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            reader = _mooncake(lines) if first.lstrip().startswith("{") else _azure(lines)
            arrivals = list(itertools.islice(reader, limit))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path}: {error}") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ConfigError(f"--trace {path}: {error}; allowed: {KNOWN}") from None
    if not arrivals:
        raise ConfigError(f"--trace {path} holds no arrival; allowed: {KNOWN}")
    begin = min(arrival.at_s for arrival in arrivals)
    return [Arrival(a.at_s - begin, a.input_tokens, a.output_tokens, a.blocks) for a in arrivals]


def _mooncake(lines: Iterator[str]) -> Iterator[Arrival]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for line in lines:
        if line.strip():
            row = decoder.decode(line)
            yield Arrival(row.timestamp / 1e3, row.input_length, row.output_length, row.hash_ids)


def _azure(lines: Iterator[str]) -> Iterator[Arrival]:
    for row in csv.DictReader(lines):
        at = datetime.datetime.fromisoformat(row["TIMESTAMP"]).replace(tzinfo=datetime.UTC)
        yield Arrival(at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def trace_requests(
    corpus: Corpus, arrivals: Sequence[Arrival], *, limit: int | None = None, speed: float = 1.0, seed: int = 0
) -> tuple[list[BenchRequest], int]:
    """Requests of these lengths at these times, `speed` times as fast; and how many had to be cut.

    `limit`: tokens of prompt and answer together, see `clipped_lengths`.
    """
    rng = random.Random(f"trace {seed}")
    requests: list[BenchRequest] = []
    num_clipped = 0
    for i, arrival in enumerate(arrivals):
        asked = max(arrival.input_tokens, 1), max(arrival.output_tokens, 1)
        input_tokens, output_tokens = clipped_lengths(*asked, limit) if limit else asked
        num_clipped += (input_tokens, output_tokens) != asked
        request = BenchRequest(
            id=f"t{i}",
            prompt=_prompt(corpus, arrival.blocks, input_tokens, rng, seed),
            num_prompt_tokens=input_tokens,
            output_tokens=output_tokens,
            arrival_s=arrival.at_s / speed,
            group=f"block {arrival.blocks[0]}" if arrival.blocks else "",
        )
        requests.append(request)
    return requests, num_clipped


def _prompt(corpus: Corpus, blocks: Sequence[int], num_tokens: int, rng: random.Random, seed: int) -> Prompt:
    """The blocks' tokens, as far as they reach, then tokens of its own."""
    places = len(corpus.pieces)
    stretches = []
    for block in blocks:
        start = random.Random(f"block {seed} {block}").randrange(places)
        stretches.append(corpus.stretch(start, min(num_tokens, BLOCK_TOKENS)))
        num_tokens -= BLOCK_TOKENS
        if num_tokens <= 0:
            return join(*stretches)
    return join(*stretches, corpus.stretch(rng.randrange(places), num_tokens))
