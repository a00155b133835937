"""The command line of the comparison: who, how often, and what is written where.

Knows nothing of any engine. Every round starts each peer anew, so that a machine that drifts does so under all.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import aiohttp
import msgspec

from bench.peers import plot, table
from bench.peers.base import GIB, Home, Peer, choose
from bench.peers.load import LOADS, Load, make_workloads
from bench.peers.quality import Perplexity
from bench.peers.results import Comparison, Row
from bench.peers.session import Session
from servd.benchmark import data_hash
from servd.benchmark.report import this_commit, this_machine
from servd.config import ModelConfig
from servd.engine.tokenizer import Tokenizer
from servd.errors import ConfigError
from servd.hub import resolve_model

RESULTS = Path(__file__).parent.parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Install, prepare, measure, write. Exit code 1 if a peer did not run."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    home = Home.default()
    try:
        if arguments.rounds < 1:
            raise ConfigError(f"--rounds is {arguments.rounds}; allowed: at least 1")
        peers = choose(arguments.peer)
        files = resolve_model(arguments.model)
        tokenizer = Tokenizer.from_files(files)
        workloads = make_workloads(tokenizer, arguments.seed)
        session = Session(home, files, tokenizer, workloads, _chosen_loads(arguments.load))
        for peer in peers:
            peer.install(home)
            peer.prepare(home, files)
        if arguments.install:
            return 0
        comparison = _begin(session, peers, arguments, sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        parser.error(error.message)
    _fill(comparison, session, peers, arguments)
    _write(comparison, arguments.out)
    sys.stdout.write(table.markdown(comparison))
    return int(any(row.error for row in comparison.rows))


def _begin(
    session: Session, peers: Sequence[Peer], arguments: argparse.Namespace, argv: Sequence[str]
) -> Comparison:
    """The comparison without figures, or with those of the one that it goes on with."""
    comparison = Comparison(
        command=f"python -m bench.peers.run {shlex.join(argv)}".strip(),
        machine=_machine(), commit=this_commit(), model=session.files.name, seed=arguments.seed,
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        workloads={name: data_hash(requests) for name, requests in session.workloads.items()},
        rows=[session.describe(peer) for peer in peers],
    )  # fmt: skip
    earlier = arguments.out.with_suffix(".json")
    if arguments.resume and earlier.is_file():
        comparison.take_over(msgspec.json.decode(earlier.read_bytes(), type=Comparison))
    return comparison


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.run", description="servd beside other engines")
    parser.add_argument("model", nargs="?", default=ModelConfig().model, help="catalogue name or .gguf [%(default)s]")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="this one; repeatable [all]")
    parser.add_argument("--load", action="append", default=[], metavar="NAME", help="this one; repeatable [all]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="figures are medians of them [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides the requests [%(default)s]")
    parser.add_argument("--resume", action="store_true", help="go on with the comparison that --out already holds")
    parser.add_argument("--no-quality", action="store_true", help="ask no questions, measure no perplexity")
    parser.add_argument("--install", action="store_true", help="fetch and build what is missing, and end")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "peers", metavar="STEM",
        help="what .md, .json and .svg are appended to [bench/results/peers]",
    )  # fmt: skip
    return parser


def _chosen_loads(names: Sequence[str]) -> Sequence[Load]:
    known = {load.name: load for load in LOADS}
    for name in names:
        if name not in known:
            raise ConfigError(f"--load is {name!r}; allowed: {', '.join(known)}")
    return [known[name] for name in names] or LOADS


def _machine() -> str:
    machine = this_machine()
    memory = f", {machine.memory_bytes / GIB:.0f} GiB" if machine.memory_bytes else ""
    return f"{machine.cpu}, {machine.cores} cores{memory}, {machine.kernel}, Python {machine.python}"


def _fill(comparison: Comparison, session: Session, peers: Sequence[Peer], arguments: argparse.Namespace) -> None:
    """Every peer in turn, so many rounds; one that fails is left out of the next."""
    pairs = [(peer, row) for row in comparison.rows for peer in peers if peer.name == row.name]
    for turn in range(arguments.rounds):
        for peer, row in pairs:
            if row.error is None and len(row.rounds) <= turn:
                _note(f"round {turn + 1} of {arguments.rounds}: {peer.name}")
                _attempt(session, row, partial(_run_round, session, peer, row))
                _write(comparison, arguments.out)
    perplexity = Perplexity(session.home, session.files)
    for peer, row in pairs:
        if row.error is None and row.quality is None and not arguments.no_quality:
            _note(f"quality: {peer.name}")
            _attempt(session, row, partial(_judge, session, perplexity, peer, row))


def _attempt(session: Session, row: Row, do: Callable[[], None]) -> None:
    """A peer that fails does not take the others with it."""
    try:
        do()
    except (ConfigError, aiohttp.ClientError, OSError) as error:
        row.error = session.shown(str(error))
        _note(f"{row.name} failed: {error}")


def _judge(session: Session, perplexity: Perplexity, peer: Peer, row: Row) -> None:
    row.quality = session.quality(peer)
    perplexity.add_to(row.quality, peer)


def _run_round(session: Session, peer: Peer, row: Row) -> None:
    round = session.round(peer)
    row.rounds.append(round)
    rates = ", ".join(f"{one.load} {one.summary.output_tokens_per_s:.0f} tok/s" for one in round.loads)
    _note(f"  ready after {round.start_s:.1f} s; {rates}")


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _write(comparison: Comparison, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = msgspec.json.format(msgspec.json.encode(comparison), indent=1)
    stem.with_suffix(".json").write_bytes(content + b"\n")
    stem.with_suffix(".md").write_text(table.markdown(comparison), encoding="utf-8")
    if any(row.rounds for row in comparison.rows):
        plot.draw(comparison, stem.with_suffix(".svg"))


if __name__ == "__main__":
    sys.exit(main())
