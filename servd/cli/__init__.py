"""The command line: `servd COMMAND`, one file of this folder a command.

Owns parsing and exit codes. Imports nothing heavy, so that --help is instant; commands import what they need to run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import servd
from servd.cli.command import COMMANDS
from servd.errors import ConfigError, InvalidRequestError, ServdError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SIGNAL = 128  # plus the signal's number, as shells have it


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, like every other start-up error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="servd", description="servd: a high-throughput LLM serving engine", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"servd {servd.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS.discover():
        command = COMMANDS.get(name)
        subparser = subparsers.add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0, 1 failed while running, 2 wrong flags, model or prompt)."""
    try:
        arguments = make_parser().parse_args(argv)
        code = COMMANDS.get(arguments.command).run(arguments)
        sys.stdout.flush()
        return code
    except (ConfigError, InvalidRequestError) as error:
        return _fail(error, EXIT_USAGE)
    except ServdError as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_SIGNAL + signal.SIGINT
    except BrokenPipeError:  # `servd generate | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit complains
        return EXIT_SIGNAL + signal.SIGPIPE


def _fail(error: ServdError, exit_code: int) -> int:
    sys.stderr.write(f"servd: error: {' '.join(error.message.split())}\n")
    return exit_code
