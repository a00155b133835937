#!/usr/bin/env python3
"""Owns the offline benchmark: the requests of `servd bench` through `servd.LLM`, in this process, all at once.
Gives throughput only: how many tokens a second the engine makes when no HTTP and no client share the machine."""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from servd import LLM, SamplingParams
from servd.benchmark import Corpus, WorkloadSpec, data_hash, freshen, make_workload
from servd.benchmark.report import this_commit, this_machine
from servd.benchmark.requests import clip_to_context
from servd.benchmark.server import CORPUS_CHARS
from servd.cli.flags import add_flags, read_flags
from servd.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig
from servd.errors import ConfigError
from servd.eval.text import python_help

SECTIONS: tuple[type[Any], ...] = (ModelConfig, CacheConfig, SchedulerConfig, ParallelConfig)
SERVER_ONLY = ("served_model_name", "generation_config", "max_num_queued_reqs")
WARMUP_REQUESTS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("load")
    group.add_argument("--workload", choices=("chat", "prefix"), default="chat", help="see servd bench")
    group.add_argument("--num-requests", type=int, metavar="N", help="default: 64, with prefix 32")
    group.add_argument("--workload-seed", type=int, default=0, metavar="N", help="default: 0")
    group.add_argument("--repeat", type=int, default=3, metavar="N", help="default: 3")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    for section in SECTIONS:
        add_flags(parser, section, omit=SERVER_ONLY, defaults={"executor": "inproc"})
    arguments = parser.parse_args()
    for flag in ("num_requests", "repeat"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            parser.error(f"--{flag.replace('_', '-')} is {value}; allowed: at least 1")
    settings: dict[str, Any] = {}
    for section in SECTIONS:
        fields = dataclasses.asdict(read_flags(arguments, section))
        settings |= {name: value for name, value in fields.items() if name not in SERVER_ONLY}
    spec = WorkloadSpec.shared_prefix() if arguments.workload == "prefix" else WorkloadSpec()
    spec = dataclasses.replace(
        spec, seed=arguments.workload_seed, num_requests=arguments.num_requests or spec.num_requests
    )
    try:
        figures = _measure(settings, spec, arguments.repeat)
    except ConfigError as error:
        parser.error(error.message)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _measure(settings: dict[str, Any], spec: WorkloadSpec, repeat: int) -> dict[str, Any]:
    rates: list[float] = []
    with LLM(**settings) as llm:
        tokenizer = llm.engine.tokenizer
        corpus = Corpus.of_ids(tokenizer.encode(python_help()[:CORPUS_CHARS], add_special_tokens=False))
        requests, num_clipped = clip_to_context(make_workload(corpus, spec), llm.engine.max_model_len)
        for repetition in range(-1, repeat):  # the first warms up
            chosen = freshen(requests if repetition >= 0 else requests[:WARMUP_REQUESTS], repetition + 1)
            params = [SamplingParams(temperature=0, max_tokens=r.output_tokens, ignore_eos=True) for r in chosen]
            start = time.perf_counter()
            generations = llm.generate([r.prompt for r in chosen], params, progress=False)
            seconds = time.perf_counter() - start
            output = sum(len(answer.token_ids) for g in generations for answer in g.answers)
            prompt = sum(r.num_prompt_tokens for r in chosen)
            if repetition >= 0:
                rates.append(output / seconds)
                sys.stdout.write(
                    f"{len(chosen)} requests in {seconds:.2f} s: {output / seconds:.1f} output tok/s, "
                    f"{(output + prompt) / seconds:.1f} total tok/s\n"
                )
                sys.stdout.flush()
    sys.stdout.write(f"median {statistics.median(rates):.1f} output tok/s ({spec.describe()})\n")
    return {
        "settings": settings, "workload": spec.describe(), "data_sha256": data_hash(requests),
        "num_clipped": num_clipped, "output_tokens_per_s": rates, "commit": this_commit(),
        "machine": {name: getattr(this_machine(), name) for name in this_machine().__struct_fields__},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
