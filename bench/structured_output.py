"""What grammars cost: a mask by itself, and the inter-token times of plain streams while heavy and hostile ones arrive.

    python bench/structured_output.py            # the starter model; about 40 s

Knows nothing of HTTP: it drives the engine with its worker process.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable

import numpy as np

from servd.config import EngineConfig
from servd.engine import guidance
from servd.engine.async_engine import AsyncEngine
from servd.errors import ServdError
from servd.grammar import GrammarError, compile_grammar, fill_mask, load_vocabulary
from servd.hub import resolve_model
from servd.sampling_params import SamplingParams

STRING = {"type": "string"}
PERSON = {
    "type": "object", "required": ["name", "age", "tags"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0},
                   "tags": {"type": "array", "items": STRING, "maxItems": 3}},
}  # fmt: skip
GRAMMARS: dict[str, Callable[[int], str]] = {  # `i` makes each a text of its own: nothing is found in a cache
    "person": lambda i: guidance.from_json_schema({**PERSON, "title": str(i)}),
    "any JSON object": lambda i: guidance.from_json_schema({"type": "object", "title": str(i)}),
    "regex": lambda i: guidance.from_regex(rf"\d{{3}}-\d{{4}} [a-z]{{5,{40 + i}}}"),
    "enum of 5,000": lambda i: guidance.from_json_schema({"enum": [f"{i} value {n}" for n in range(5000)]}),
    "120 properties": lambda i: guidance.from_json_schema(
        {"type": "object", "properties": {f"a{i}_{n}": STRING for n in range(120)}}
    ),
    "1,000 required": lambda i: guidance.from_json_schema(
        {"type": "object", "properties": {f"a{i}_{n}": STRING for n in range(1000)},
         "required": [f"a{i}_{n}" for n in range(1000)]}
    ),
    "(a|aa){1,5000}": lambda i: guidance.from_regex(f"(a|aa){{1,{5000 + i}}}"),
    "((a{1,100}){1,100}){1,100}": lambda i: guidance.from_regex(f"((a{{1,100}}){{1,100}}){{1,{100 + i}}}"),
    ".*a.{25}|.*b.{27}": lambda i: guidance.from_regex(f"(.*a.{{25}}|.*b.{{{27 + i}}})"),
    "ambiguous": lambda i: guidance.from_lark(
        f'start: a\na: a a a a | b | c\nb: a b | "x"\nc: a c | "x" | "{i}" |'
    ),
    "enum of 100,000": lambda i: guidance.from_json_schema({"enum": [f"{i} {n}" for n in range(100_000)]}),
    "10,000 anyOf": lambda i: guidance.from_json_schema({"anyOf": [{"const": f"{i} {n}"} for n in range(10_000)]}),
    "multipleOf": lambda i: guidance.from_json_schema({"type": "integer", "multipleOf": 999_999_937 + i}),
}  # fmt: skip


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share)) * 1e3 if values else float("nan")


def measure_masks(model: str, num_tokens: int) -> None:
    """Compile time and mask times of each grammar, over tokens drawn evenly from what it allows."""
    files = resolve_model(model)
    vocab_size = int(files.config()["vocab_size"])
    eos = int(files.config()["eos_token_id"])
    began = time.perf_counter()
    vocabulary = load_vocabulary(files.folder / "tokenizer.json", vocab_size, [eos])
    sys.stdout.write(f"vocabulary of {vocab_size}: {1e3 * (time.perf_counter() - began):.0f} ms\n")
    mask = np.zeros(-(-vocab_size // 32), np.int32)
    rng = np.random.default_rng(1)
    for name, text_of in GRAMMARS.items():
        seconds: list[float] = []
        end = ""
        began = time.perf_counter()
        compiled = began
        try:
            matcher = compile_grammar(text_of(0), vocabulary)
            compiled = time.perf_counter()
            for _ in range(num_tokens):
                began_mask = time.perf_counter()
                fill_mask(matcher, mask)
                seconds.append(time.perf_counter() - began_mask)
                allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
                if matcher.is_stopped() or not matcher.consume_token(int(rng.choice(allowed[allowed != eos]))):
                    break
        except (GrammarError, ValueError) as error:
            compiled = max(compiled, time.perf_counter() if not seconds else compiled)
            end = str(error)[:60]
        sys.stdout.write(
            f"{name:28} compiled in {1e3 * (compiled - began):6.1f} ms; {len(seconds):3} masks: p50 "
            f"{percentile(seconds, 50):6.3f}, max {percentile(seconds, 100):7.3f} ms {end}\n"
        )


class Streams:
    """Plain streams, and what else arrives meanwhile."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.ids = itertools.count()
        self.prompt = engine.tokenizer.encode("Once upon a time")
        self.slowest_refusal = 0.0

    async def stream(self, num_tokens: int, gaps: list[float]) -> list[int]:
        """A plain answer of so many tokens; its inter-token times go to `gaps`."""
        params = SamplingParams(temperature=1.0, seed=len(gaps), max_tokens=num_tokens, ignore_eos=True)
        tokens: list[int] = []
        last = None
        async with self.engine.generate(self.prompt, params, request_id=f"s{next(self.ids)}") as outputs:
            async for output in outputs:
                now = time.perf_counter()
                if last is not None and output.token_ids:
                    gaps += [(now - last) / len(output.token_ids)] * len(output.token_ids)
                last = now
                tokens += output.token_ids
        return tokens

    async def visit(self, text: str | None) -> None:
        """One short request beside the streams, refused ones included; `text`: of its grammar."""
        params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, guidance=text, ignore_eos=text is None)
        began = time.perf_counter()
        try:
            await self.engine.check_guidance(params)
            async with self.engine.generate(self.prompt, params, request_id=f"v{next(self.ids)}") as outputs:
                async for _ in outputs:
                    pass
        except ServdError:
            self.slowest_refusal = max(self.slowest_refusal, time.perf_counter() - began)

    async def run(self, num_streams: int, num_tokens: int, visitors: list[str | None]) -> list[float]:
        """Inter-token times of the streams; the visitors come one after the other, four times a second."""
        gaps: list[list[float]] = [[] for _ in range(num_streams)]
        streams = asyncio.gather(*(self.stream(num_tokens, one) for one in gaps))
        visits = []
        for text in itertools.cycle(visitors or [""]):
            if streams.done():
                break
            if visitors:
                visits.append(asyncio.create_task(self.visit(text)))
            await asyncio.wait([streams], timeout=0.25)
        await asyncio.gather(*visits)
        return [gap for one in gaps for gap in one]


async def measure_streams(model: str, num_streams: int, num_tokens: int, num_rounds: int) -> None:
    """Inter-token times alone, beside plain visitors and beside visitors with grammars, in turns; medians of rounds."""
    # No guesses: several tokens in a step would blur the times.
    config = EngineConfig.from_flat(model=model, max_model_len=2048, kv_cache_memory=1 << 29, num_speculative_tokens=0)
    engine = AsyncEngine(config, resolve_model(model))
    await engine.start()
    streams = Streams(engine)
    await streams.run(num_streams, 20, [GRAMMARS["person"](1)])  # the vocabularies are read, caches are warm
    numbers = itertools.count(2)  # no text comes twice
    rounds: dict[str, list[list[float]]] = {"alone": [], "plain visitors": [], "grammars": []}
    for _ in range(num_rounds):
        heavy: list[str | None] = [text_of(next(numbers)) for text_of in GRAMMARS.values()]
        kinds: tuple[list[str | None], ...] = ([], [None], heavy)
        for (name, found), visitors in zip(rounds.items(), kinds, strict=True):
            gaps = await streams.run(num_streams, num_tokens, visitors)
            found.append([percentile(gaps, share) for share in (50, 99, 100)])
            sys.stdout.write(f"  {name:15} " + ", ".join(f"{value:6.2f}" for value in found[-1]) + "\n")
    medians = {name: np.median(found, axis=0) for name, found in rounds.items()}
    for name, (p50, p99, longest) in medians.items():
        sys.stdout.write(
            f"{num_streams} streams, {name:15} inter-token p50 {p50:6.2f}, p99 {p99:6.2f}, max {longest:6.2f} ms; "
            f"medians of {num_rounds} rounds\n"
        )
    sys.stdout.write(f"slowest refusal: {streams.slowest_refusal * 1e3:.0f} ms\n")
    ratios = {name: round(float(medians["grammars"][1] / medians[name][1]), 2) for name in ("alone", "plain visitors")}
    sys.stdout.write(json.dumps({"p99_of_grammars_over": ratios}) + "\n")
    await engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--masks", type=int, default=100, help="tokens of each grammar in the first part; 0: none")
    args = parser.parse_args()
    if args.masks:
        measure_masks(args.model, args.masks)
    asyncio.run(measure_streams(args.model, args.streams, args.tokens, args.rounds))


if __name__ == "__main__":
    main()
