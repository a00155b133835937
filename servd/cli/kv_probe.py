"""`servd kv-probe`: what each KV storage type costs in quality and gains in room, for one model.

Knows nothing of how it is measured (servd.eval.kv_probe).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from servd.cli.command import COMMANDS, Command
from servd.cli.judging import add_model_flags, add_text_flags, read_config
from servd.cli.progress import progress_display
from servd.cli.signals import ended_by_signals
from servd.errors import ConfigError

if TYPE_CHECKING:
    from servd.eval.kv_probe import ProbeResult

DEFAULT_CHOICES = ("fp8_e4m3", "int8", "k=int8,v=int4", "int4")


class KVProbeCommand(Command):
    """Loads the model into this process, runs a text through it once for each type."""

    help = "compare KV storage types of a model: perplexity, equal tokens, room"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The types, the text, where results go, and how the model is loaded."""
        group = parser.add_argument_group("probe")
        group.add_argument(
            "--kv-cache-dtype", action="append", default=[], metavar="TYPE",
            help=f"type to compare with the full cache; repeatable [default: {' '.join(DEFAULT_CHOICES)}]",
        )  # fmt: skip
        add_text_flags(group)
        group.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.png, .svg; needs matplotlib)")
        add_model_flags(parser, omit=["kv_cache_dtype"])  # it has its own

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the table."""
        config = read_config(arguments)
        names = arguments.kv_cache_dtype or list(DEFAULT_CHOICES)
        caches = {name: dataclasses.replace(config.cache, kv_cache_dtype=name) for name in names}
        for cache in caches.values():  # a wrong flag is told before a download
            config = dataclasses.replace(config, cache=cache).resolve()
        _check(arguments)
        with progress_display() as progress, ended_by_signals():
            from servd.engine.tokenizer import Tokenizer
            from servd.eval.kv_probe import probe_model
            from servd.eval.text import read_tokens
            from servd.hub import resolve_model

            files = resolve_model(config.model.model, progress=progress)
            token_ids = read_tokens(Tokenizer.from_files(files), arguments.text, arguments.tokens)
            results = probe_model(config, files, token_ids, caches, context=arguments.context, progress=progress)
        _print(results)
        if arguments.json:
            arguments.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n")
        if arguments.plot:
            plot(results, arguments.plot)
        return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.plot and arguments.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot is {arguments.plot}; allowed: a file that ends in .png, .svg or .pdf")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; install servd[plot]")


def _print(results: list[ProbeResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("KV cache")
    for title in ("bytes/token", "room", "requests", "perplexity", "change", "KL", "top-1 equal", "greedy equal"):
        table.add_column(title, justify="right")
    for result in results:
        table.add_row(
            result.kv_cache_dtype, f"{result.bytes_per_token:,.0f}", f"{result.capacity:.2f}x",
            f"{result.requests_that_fit}", f"{result.perplexity:.4f}", f"{result.perplexity_change:+.2%}",
            f"{result.kl_divergence:.5f}", f"{result.top1_equal:.1%}", f"{result.greedy_equal:.1%}",
        )  # fmt: skip
    Console(width=120).print(table)


def plot(results: list[ProbeResult], path: Path) -> None:
    """Room against loss, a point a type."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for result in results:
        change = 100 * result.perplexity_change
        axes.plot(result.capacity, change, "o")
        axes.annotate(result.kv_cache_dtype, (result.capacity, change), xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel("tokens that fit, relative to the full cache")
    axes.set_ylabel("perplexity, change in %")
    axes.grid(alpha=0.3)
    figure.savefig(path)


COMMANDS.register("kv-probe")(KVProbeCommand())
