"""`servd generate`: one prompt, offline, the text to stdout.

Knows nothing of servers.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from servd.cli.command import COMMANDS, Command
from servd.cli.flags import add_flags, read_flags
from servd.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig

SECTIONS: tuple[type[Any], ...] = (ModelConfig, CacheConfig, SchedulerConfig, ParallelConfig)


class GenerateCommand(Command):
    """Loads the model into this process, answers, ends."""

    help = "continue one prompt, offline"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The prompt, how to sample, and all engine settings."""
        group = parser.add_argument_group("request")
        group.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; - reads it from stdin")
        group.add_argument(
            "--max-tokens", type=int, default=128, metavar="TOKENS", help="longest answer [default: 128]"
        )
        group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy [default: 0]")
        group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus mass [default: 1]")
        group.add_argument("--top-k", type=int, default=0, metavar="N", help="0 keeps all tokens [default: 0]")
        group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends it; repeatable")
        for section in SECTIONS:
            add_flags(parser, section)
        parser.set_defaults(executor="inproc")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the prompt's continuation."""
        from servd.engine.llm import LLM
        from servd.sampling_params import SamplingParams

        prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        params = SamplingParams(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            stop=tuple(arguments.stop),
        )
        settings: dict[str, Any] = {}
        for section in SECTIONS:
            settings |= dataclasses.asdict(read_flags(arguments, section))
        with LLM(**settings) as llm:
            sys.stdout.write(llm.generate(prompt, params)[0].text + "\n")
        return 0


COMMANDS.register("generate")(GenerateCommand())
