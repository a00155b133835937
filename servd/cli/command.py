"""What a command is, and the table of them.

Knows nothing of any particular command.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from typing import ClassVar

from servd.registry import Registry


class Command(ABC):
    """One subcommand. Its file imports nothing heavy at import time: `--help` imports all of them."""

    help: ClassVar[str]

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare flags and positionals."""

    @abstractmethod
    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit code. Raises ConfigError for wrong input, another ServdError for a failure."""


COMMANDS: Registry[Command] = Registry("command", "servd.cli")
