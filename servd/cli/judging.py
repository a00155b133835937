"""What the commands that judge a model by a text share: the text's flags, the model's, and their checks.

Knows nothing of what is judged.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from servd.cli.flags import add_flags, read_flags
from servd.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig
from servd.errors import ConfigError

# Fields that belong to serving: they change nothing that is measured.
SERVING_ONLY = (
    "served_model_name", "generation_config", "seed", "kv_shadow_rate", "gpu_memory_utilization",
    "enable_prefix_caching", "replay_steps", "executor", "max_worker_restarts",
)  # fmt: skip
LEAST = {"tokens": 128, "context": 2}


def add_text_flags(group: argparse._ArgumentGroup) -> None:
    """The text and the file of results."""
    group.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to judge by [default: the docs in Python itself]"
    )
    group.add_argument("--tokens", type=int, default=6144, metavar="N", help="tokens of it [default: 6144]")
    group.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of a context [default: 1024]")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")


def add_model_flags(parser: argparse.ArgumentParser, *, omit: Collection[str]) -> None:
    """How the model is loaded: all that changes what is measured, but for `omit`."""
    for section in (ModelConfig, CacheConfig, ParallelConfig):
        add_flags(parser, section, omit=(*SERVING_ONLY, *omit))


def read_config(arguments: argparse.Namespace) -> EngineConfig:
    """The settings asked for. Raises ConfigError for a text too short to judge by, or a --json that cannot be."""
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value < least:
            raise ConfigError(f"--{name} is {value}; allowed: at least {least}")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ConfigError(f"--json is {arguments.json}; allowed: a file in a folder that exists")
    return EngineConfig(
        model=read_flags(arguments, ModelConfig),
        cache=read_flags(arguments, CacheConfig),
        parallel=read_flags(arguments, ParallelConfig),
    )
