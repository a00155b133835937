"""`servd generate`: one prompt, offline, the text to stdout.

Knows nothing of servers.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from servd.cli.command import COMMANDS, Command
from servd.cli.flags import add_flags, read_flags
from servd.cli.progress import progress_display
from servd.cli.signals import ended_by_signals
from servd.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig

if TYPE_CHECKING:
    from servd.sampling_params import SamplingParams

SECTIONS: tuple[type[Any], ...] = (ModelConfig, CacheConfig, SchedulerConfig, ParallelConfig)
SERVER_ONLY = ("served_model_name", "max_num_queued_reqs")


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
        own = "[default: the model's own, see --generation-config]"
        group.add_argument("--temperature", type=float, metavar="X", help=f"0 is greedy {own}")
        group.add_argument("--top-p", type=float, metavar="X", help=f"nucleus mass {own}")
        group.add_argument("--top-k", type=int, metavar="N", help=f"0 keeps all tokens {own}")
        group.add_argument(
            "--stop", action="append", default=[], metavar="TEXT", help="text that ends it; repeatable [default: none]"
        )
        for section in SECTIONS:
            add_flags(parser, section, omit=SERVER_ONLY, defaults={"executor": "inproc"})

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the prompt's continuation."""
        from servd.engine.llm import LLM
        from servd.hub import resolve_model

        prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        settings: dict[str, Any] = {}
        for section in SECTIONS:
            settings |= dataclasses.asdict(read_flags(arguments, section))
        EngineConfig.from_flat(**settings).resolve()  # a wrong flag is told before a download
        with progress_display() as progress, ended_by_signals():
            resolve_model(arguments.model, progress=progress)  # a download shows servd's bars instead of pip's lines
        with LLM(**settings) as llm:
            params = read_sampling(arguments, llm.engine.sampling_defaults)
            sys.stdout.write(llm.generate(prompt, params)[0].text + "\n")
        return 0


def read_sampling(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> SamplingParams:
    """The model's own defaults, under what was asked for."""
    from servd.sampling_params import SamplingParams

    given = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(**{**defaults, **given, "stop": tuple(arguments.stop)})


COMMANDS.register("generate")(GenerateCommand())
