"""`servd pull`: fetch a model of the catalogue, or list them.

Knows nothing of how a model is fetched.
"""

from __future__ import annotations

import argparse
import sys

from servd.cli.command import COMMANDS, Command
from servd.cli.progress import progress_display
from servd.cli.signals import ended_by_signals
from servd.errors import ConfigError

MB = 1_000_000


class PullCommand(Command):
    """Fetches once; the second time it only checks."""

    help = "fetch a model of the catalogue (once), or list what there is"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """NAME, or --list."""
        parser.add_argument("name", nargs="?", metavar="NAME", help="name in the catalogue")
        parser.add_argument("--list", action="store_true", help="show the catalogue")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the folder of the model, or the catalogue."""
        from servd.hub import CATALOGUE, pull, servd_home

        if arguments.list:
            for name, entry in sorted(CATALOGUE.items()):
                size = f"{entry.member_size / MB:.0f} MB"
                sys.stdout.write(f"{name}  {entry.display_name}, {size}, {entry.licence}\n")
            return 0
        if arguments.name is None:
            raise ConfigError(f"which model? known: {', '.join(sorted(CATALOGUE))}")
        with progress_display() as progress, ended_by_signals():
            files = pull(arguments.name, progress)
        sys.stdout.write(f"{files.name} is in {servd_home()}; start it with: servd serve {files.name}\n")
        return 0


COMMANDS.register("pull")(PullCommand())
