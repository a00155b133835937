"""`servd keys`: make, hash and list the entries of a key file.

Knows nothing of servers. A key is shown once, when it is made, and read from stdin, not from arguments that `ps` shows.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from servd.cli.command import COMMANDS, Command
from servd.errors import ConfigError


class KeysCommand(Command):
    """Entries for --api-keys-file."""

    help = "make, hash or list API keys for serve --api-keys-file"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """new, hash or list."""
        actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
        for name, text in (
            ("new", "make a random key; it is printed once, its entry goes to --file or is printed too"),
            ("hash", "make the entry of a key of your own, read from stdin"),
        ):
            action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
            action.add_argument("--name", required=True, help="whose key it is: logs show it")
            action.add_argument("--tenant", help="keys of one tenant share cached prefixes; default: the name")
            action.add_argument("--models", help="models that it may use, with commas between; default: all")
            action.add_argument("--requests-per-minute", type=int, metavar="N")
            action.add_argument("--tokens-per-minute", type=int, metavar="N", help="of prompts and answers")
            action.add_argument("--max-concurrent", type=int, metavar="N", help="requests in work at once")
            action.add_argument("--expires", metavar="TIME", help="void from then on: 2027-01-31 or 2027-01-31T12:00Z")
            action.add_argument("--file", type=Path, help="append the entry to this file of JSON lines")
        text = "show what a key file holds"
        listing = actions.add_parser("list", help=text, description=text, allow_abbrev=False)
        listing.add_argument("file", type=Path)

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the key, its entry, or a table."""
        from servd.api.keys import new_key

        if arguments.action == "list":
            sys.stdout.write("".join(_table(arguments.file)))
            return 0
        key = new_key() if arguments.action == "new" else sys.stdin.readline().strip()
        line = msgspec.json.encode(_entry(arguments, key)).decode() + "\n"
        if arguments.file is None:
            sys.stdout.write(f"{key}\n{line}" if arguments.action == "new" else line)
            return 0
        _append(arguments.file, line)
        sys.stdout.write(f"{key}\n" if arguments.action == "new" else "")
        return 0


COMMANDS.register("keys")(KeysCommand())


def _entry(arguments: argparse.Namespace, key: str) -> Any:
    from servd.api.keys import KeyEntry, hash_key

    entry = KeyEntry(
        name=arguments.name,
        hash=hash_key(key),
        tenant=arguments.tenant,
        models=None if arguments.models is None else [name.strip() for name in arguments.models.split(",")],
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_minute=arguments.tokens_per_minute,
        max_concurrent=arguments.max_concurrent,
        expires=None if arguments.expires is None else _moment(arguments.expires),
    )
    try:
        return msgspec.convert(msgspec.to_builtins(entry), KeyEntry)  # checks names and ranges
    except msgspec.ValidationError as error:
        raise ConfigError(f"this makes no key entry: {error}") from None


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--expires is {text!r}; allowed: 2027-01-31 or 2027-01-31T12:00Z") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _append(path: Path, line: str) -> None:
    """Add a line, in one write: a server may read the file at any moment. Raises ConfigError.

    What an editor left without a newline at its end gets one first, or the new entry would spoil the last one.
    """
    from servd.api.keys import read_keys

    if path.suffix == ".toml":
        raise ConfigError(f"--file is {path}; allowed: a file of JSON lines, or none, to paste the entry yourself")
    if path.exists() and any(f'"name":"{entry.name}"' in line for entry in read_keys(path)):
        raise ConfigError(f"{path} has a key of that name already")
    try:
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            line = "\n" + line
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(line.encode())
    except OSError as error:
        raise ConfigError(f"--file {path} cannot be written: {error.strerror or error}") from None


def _table(path: Path) -> list[str]:
    from servd.api.keys import read_keys

    now = datetime.now(UTC)
    rows: list[tuple[str, ...]] = [("NAME", "TENANT", "MODELS", "REQUESTS/MIN", "TOKENS/MIN", "AT ONCE", "STATE")]
    for entry in read_keys(path):
        limits = (entry.requests_per_minute, entry.tokens_per_minute, entry.max_concurrent)
        expiry = "valid" if entry.expires is None else f"valid until {entry.expires.isoformat()}"
        rows.append(
            (entry.name, entry.tenant or entry.name, "all" if entry.models is None else ",".join(entry.models))
            + tuple("-" if limit is None else str(limit) for limit in limits)
            + (entry.void_because(now) or expiry,)
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
            for row in rows]  # fmt: skip
