"""Embeddings: prompt-only requests whose pooled hidden states become vectors.

Owns how many run at once and what is done to a vector. Knows nothing of transports, nor of how the worker pools.
"""

from __future__ import annotations

import asyncio
import math
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from servd.engine.result_stream import ResultStream
from servd.errors import InvalidRequestError
from servd.outputs import RequestOutput
from servd.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Embedding:
    """One prompt's vector."""

    values: array[float]  # float32, [hidden_size] or [dimensions]
    num_prompt_tokens: int
    num_cached_tokens: int

    def to_bytes(self) -> bytes:
        """Little-endian float32, as OpenAI's base64 form holds them."""
        values = self.values
        if sys.byteorder == "big":
            values = values[:]
            values.byteswap()
        return values.tobytes()


def pooling_params(pooling: str) -> SamplingParams:
    """What makes a request an embedding request: nothing is sampled, the prompt's hidden states are pooled."""
    return SamplingParams(max_tokens=0, pooling=pooling)


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raise InvalidRequestError unless so many of a vector's values can be had."""
    if dimensions is None:
        return
    if type(dimensions) is not int or not 1 <= dimensions <= hidden_size:
        raise InvalidRequestError(
            f"dimensions is {dimensions!r}; allowed: 1 to {hidden_size} (the model's hidden size)", param="dimensions"
        )


async def embed_all(
    start: Callable[[int], ResultStream],
    count: int,
    *,
    num_at_once: int,
    dimensions: int | None,
    normalize: bool,
) -> list[Embedding]:
    """Run `count` requests, of which `start` begins one by its number, in order; `num_at_once` at a time.

    Raises the first failure, after ending the others; also a cancelled call leaves nothing running.
    """
    outputs: dict[int, RequestOutput] = {}
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            async with start(number) as stream:
                async for output in stream:
                    if output.error is not None:
                        raise output.error
                    outputs[number] = output

    tasks = [asyncio.create_task(work()) for _ in range(min(num_at_once, count))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [_embedding(outputs[number], dimensions, normalize=normalize) for number in range(count)]


def _embedding(output: RequestOutput, dimensions: int | None, *, normalize: bool) -> Embedding:
    assert output.embedding is not None, f"{output.request_id} ended without a vector"
    values = array("f")
    values.frombytes(output.embedding)
    if sys.byteorder == "big":
        values.byteswap()
    values = values[:dimensions]
    if normalize:
        length = math.sqrt(math.fsum(value * value for value in values))
        if length > 0:
            values = array("f", (value / length for value in values))
    return Embedding(values, output.num_prompt_tokens, output.num_cached_tokens)
