#!/usr/bin/env python3
"""Owns the growth curves: tokens/s against concurrency, context, prompt length and threads, with the machine's limit.
Does not know kernels or servers: an engine in this process computes, the limit comes from bytes and operations."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
# This folder must not be searched for modules: Python's own `profile` would be bench/profile.py.
sys.path[:] = [str(ROOT), str(ROOT / "kernels"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "bench")]

from servd.cli.flags import add_flags, read_flags  # noqa: E402
from servd.config import CacheConfig, EngineConfig, ModelConfig  # noqa: E402
from servd.errors import ConfigError  # noqa: E402

if TYPE_CHECKING:
    from bench.profiling.costs import ModelCost
    from servd import LLM
    from servd.engine.core import StepRecord

OMITTED = ("served_model_name", "generation_config", "seed", "kv_shadow_rate", "enable_prefix_caching")
FEWEST_TOKENS = 4  # of an answer
ROOM_TOKENS = 16  # of a context, kept free for answers that are a little longer


@dataclass(frozen=True, slots=True)
class Sweep:
    """How far each curve goes."""

    threads: tuple[int, ...]
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    context: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)  # tokens before the answer
    prompt: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    answer: int = 32  # tokens
    short_prompt: int = 64  # tokens, where the prompt does not matter


QUICK = Sweep((1, 2), (1, 2), (16, 32), (16, 32), answer=8, short_prompt=8)
LABELS = {
    "concurrency": "requests at a time, each {short_prompt} tokens of prompt",
    "context": "tokens of context, one request",
    "prompt": "tokens of one prompt",
    "threads": "threads",
}


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement."""

    x: int
    series: str  # "decode", "prefill"; with threads also the number of requests
    tokens_per_s: float  # computed by the worker; the front overlaps with it
    memory_limit: float  # tokens/s if all that must be read came at the machine's bandwidth, and nothing else took time
    compute_limit: float  # tokens/s if all operations ran at the peak of their unit


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the curves asked for; a plot and its figures as JSON of each."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=list(LABELS), action="append", help="this curve; may be given again")
    parser.add_argument(
        "--at", type=int, action="append", metavar="X", help="measure there, not at the usual places; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER", help="for the files")
    parser.add_argument("--quick", action="store_true", help="few and short points: to see that it works")
    for section in (ModelConfig, CacheConfig):
        add_flags(parser, section, omit=OMITTED)
    arguments = parser.parse_args(argv)
    if min(arguments.at or [1]) < 1:
        parser.error(f"--at is {min(arguments.at)}; allowed: at least 1")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib; install servd[plot]")
    model, cache = read_flags(arguments, ModelConfig), read_flags(arguments, CacheConfig)
    flags = dataclasses.asdict(model) | dataclasses.asdict(cache)
    settings = {name: value for name, value in flags.items() if name not in OMITTED}
    try:
        cores = EngineConfig(model, cache).resolve().parallel.threads or 1
        sweep = QUICK if arguments.quick else Sweep(threads=tuple(1 << n for n in range(cores.bit_length())))
        curves = arguments.only or list(LABELS)
        if arguments.at:
            sweep = dataclasses.replace(sweep, **dict.fromkeys(curves, tuple(arguments.at)))
        run(curves, settings, sweep, arguments.out)
    except ConfigError as error:
        parser.error(error.message)
    return 0


def run(curves: Sequence[str], settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
    """Measure and draw the curves, a file of each kind a curve. Raises ConfigError for wrong settings."""
    from servd_kernels import stands

    machine = stands.stand_for("cpu").describe()
    out.mkdir(parents=True, exist_ok=True)
    for name in curves:
        points = measure(name, settings, sweep)
        content = {
            "command": sys.argv, "machine": machine, "settings": settings,
            "points": [dataclasses.asdict(point) for point in points],
        }  # fmt: skip
        (out / f"growth-{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        label = LABELS[name].format(short_prompt=sweep.short_prompt)
        plot(label, points, f"{settings['model']}: {machine.split(';')[0]}", out / f"growth-{name}.svg")


def measure(curve: str, settings: dict[str, Any], sweep: Sweep) -> list[Point]:
    """One curve. An engine has this process to itself; the limits are measured with its threads."""
    found: list[Point] = []
    for threads in sweep.threads if curve == "threads" else (None,):
        concurrency = max(sweep.concurrency) if curve == "concurrency" else 32
        with Bench(settings, threads, concurrency) as bench:
            found += CURVES[curve](bench, sweep)
    for point in found:
        limit = min(point.memory_limit, point.compute_limit)
        sys.stdout.write(
            f"{curve} {point.x}, {point.series}: {point.tokens_per_s:,.1f} tokens/s, "
            f"{point.tokens_per_s / limit:.0%} of the limit\n"
        )
        sys.stdout.flush()
    return found


class Bench:
    """An engine in this process, what its steps took, and what they could not have gone below."""

    def __init__(self, settings: dict[str, Any], threads: int | None, max_num_seqs: int) -> None:
        from servd_kernels import floor

        from bench.profiling.costs import model_cost
        from servd import LLM

        # Without guesses: a point is a step in which each request computes one token.
        self.llm: LLM = LLM(
            **settings, threads=threads, max_num_seqs=max_num_seqs, enable_prefix_caching=True, num_speculative_tokens=0
        )
        model = self.llm.engine.executor._worker.model  # type: ignore[attr-defined] # what has no public face
        self.cost: ModelCost = model_cost(model)
        self.threads = threads or 0
        engine = self.llm.engine
        self.kv_bytes = engine.info.block_bytes / engine.config.cache.block_size  # of a token, in all layers
        self._floor = floor.measure()  # with the threads that the engine has set
        self._random = random.Random(0)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.close()

    def by_concurrency(self, sweep: Sweep) -> list[Point]:
        """Decode steps of more and more requests."""
        return [self.decode(count, count, sweep.short_prompt, sweep.answer) for count in sweep.concurrency]

    def by_context(self, sweep: Sweep) -> list[Point]:
        """Decode steps of one request behind more and more tokens; the prefix cache has most of them."""
        most = self.llm.engine.max_model_len - sweep.answer - ROOM_TOKENS
        lengths = sorted({min(length, most) for length in sweep.context})
        text = self.prompts(1, lengths[-1])[0]
        return [self.decode(length, 1, length, sweep.answer, [text[:length]]) for length in lengths]

    def by_prompt(self, sweep: Sweep) -> list[Point]:
        """Prefill of one prompt, in the scheduler's chunks."""
        most = self.llm.engine.max_model_len - ROOM_TOKENS
        return [self.prefill(length, length) for length in sorted({min(length, most) for length in sweep.prompt})]

    def by_threads(self, sweep: Sweep) -> list[Point]:
        """Decode of one and of many, and prefill, on the threads that this engine has."""
        many = min(32, max(sweep.concurrency))
        points = [self.decode(self.threads, count, sweep.short_prompt, sweep.answer) for count in (1, many)]
        points = [
            dataclasses.replace(point, series=f"decode, {count}")
            for point, count in zip(points, (1, many), strict=True)
        ]
        return [*points, self.prefill(self.threads, min(512, max(sweep.prompt)))]

    def decode(self, x: int, count: int, context: int, answer: int, prompts: list[list[int]] | None = None) -> Point:
        """The median step in which `count` requests get a token each."""
        # The first answers must not end before the last prompt is computed, with half the budget or more.
        budget = self.llm.engine.config.scheduler.max_num_batched_tokens
        answer = max(answer, FEWEST_TOKENS) + (2 * count * context // budget if count > 1 else 0)
        steps = self._steps(prompts or self.prompts(count, context), answer)
        whole = [s.compute_seconds for s in steps if s.num_decode_tokens == count and not s.num_prefill_tokens]
        seconds = statistics.median(whole[len(whole) // 4 :])  # the first ones of a shape may be recorded
        keys = context + answer / 2
        moved = self.cost.weight_bytes + count * keys * self.kv_bytes
        operations = self.cost.seconds(count, count, self._floor.flops) + self._attention(count * keys)
        return Point(x, "decode", count / seconds, count * self._floor.read_gbps * 1e9 / moved, count / operations)

    def prefill(self, x: int, length: int) -> Point:
        """All steps that a prompt takes."""
        steps = [step for step in self._steps(self.prompts(1, length), 1) if step.num_prefill_tokens]
        seconds = sum(step.compute_seconds for step in steps)
        moved = len(steps) * self.cost.weight_bytes + length * self.kv_bytes
        operations = self.cost.seconds(length, 1, self._floor.flops) + self._attention(length * length / 2)
        return Point(x, "prefill", length / seconds, length * self._floor.read_gbps * 1e9 / moved, length / operations)

    def _attention(self, pairs: float) -> float:
        """Seconds at the peak for so many pairs of a query and a key, in all layers."""
        return pairs * self.cost.attention_operations / self._floor.flops[self.cost.attention_unit]

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Prompts that share no block with any other."""
        vocabulary = self.llm.engine.tokenizer.vocab_size
        return [[self._random.randrange(vocabulary) for _ in range(length)] for _ in range(count)]

    def _steps(self, prompts: list[list[int]], answer: int) -> list[StepRecord]:
        from servd import SamplingParams

        log = self.llm.engine.core.step_log
        log.clear()
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        self.llm.generate(prompts, params, progress=False)
        return list(log)


CURVES: dict[str, Callable[[Bench, Sweep], list[Point]]] = {
    "concurrency": Bench.by_concurrency,
    "context": Bench.by_context,
    "prompt": Bench.by_prompt,
    "threads": Bench.by_threads,
}


def plot(label: str, points: list[Point], title: str, path: Path) -> None:
    """Measured points and the limits above them, both axes logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for index, series in enumerate(dict.fromkeys(point.series for point in points)):
        own = [point for point in points if point.series == series]
        xs = [point.x for point in own]
        color = f"C{index}"
        axes.plot(xs, [point.tokens_per_s for point in own], "o-", color=color, label=series)
        axes.plot(xs, [point.memory_limit for point in own], "--", color=color, alpha=0.6, label="limit: memory")
        axes.plot(xs, [point.compute_limit for point in own], ":", color=color, alpha=0.8, label="limit: arithmetic")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    xs = sorted({point.x for point in points})
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.set_xlabel(label)
    axes.set_ylabel("tokens/s")
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
