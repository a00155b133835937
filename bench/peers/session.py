"""One round of one peer: start it, put every load on it, end it.

Knows nothing of which peers there are or of what becomes of the figures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from bench.peers.base import Home, Peer, Start
from bench.peers.load import WARMUP_CONCURRENCY, WARMUP_REQUESTS, Load, run_load
from bench.peers.process import Disturbance, Server, free_port, running
from bench.peers.quality import ask_questions
from bench.peers.results import LoadResult, Quality, Round, Row
from servd.benchmark import BenchRequest
from servd.engine.tokenizer import Tokenizer
from servd.errors import ConfigError
from servd.hub.files import ModelFiles


@dataclass(frozen=True, slots=True)
class Session:
    """What all peers share."""

    home: Home
    files: ModelFiles
    tokenizer: Tokenizer
    workloads: dict[str, list[BenchRequest]]
    loads: Sequence[Load]

    def describe(self, peer: Peer) -> Row:
        """The peer's row, still without figures; folders of this machine are not told."""
        start = peer.start(self.home, self.files, 8000, max(load.concurrency for load in self.loads))
        return Row(
            name=peer.name, weights=peer.weights, version=peer.version(self.home), notes=start.notes,
            command=[self.shown(part) for part in start.argv],
            env={name: self.shown(value) for name, value in start.env.items()},
            kv_bytes_at_start=peer.kv_bytes_at_start,
        )  # fmt: skip

    def shown(self, text: str) -> str:
        """The text without this machine's folders."""
        places = {
            str(self.home.folder): "$SERVD_BENCH_HOME",
            str(self.files.weights[0].parent): "$MODEL",
            str(Path(__file__).parents[2]): ".",
            sys.executable: "python",
            os.path.expanduser("~"): "~",
        }
        for place, name in places.items():
            text = text.replace(place, name)
        return text

    def round(self, peer: Peer) -> Round:
        """Every load once. Raises ConfigError if the peer does not run."""
        found: list[Round] = []
        for loads in _by_server(peer, self.loads):
            with self._server(peer, loads) as server:
                found.append(self._measure(server, loads))
        return Round(
            start_s=found[0].start_s,
            first_token_s=found[0].first_token_s,
            memory_at_start=max(one.memory_at_start for one in found),
            memory=max(one.memory for one in found),
            loads=[load for one in found for load in one.loads],
        )

    def quality(self, peer: Peer) -> Quality:
        """Its answers to the questions. Raises ConfigError if the peer does not run."""
        loads = _by_server(peer, self.loads)[-1]
        with self._server(peer, loads) as server:
            return ask_questions(server.url, self.files, self.tokenizer, max(load.concurrency for load in loads))

    def _server(self, peer: Peer, loads: Sequence[Load]) -> AbstractContextManager[Server]:
        port = free_port()
        start: Start = peer.start(self.home, self.files, port, max(load.concurrency for load in loads))
        return running(start, port, self.home.log(peer.name))

    def _measure(self, server: Server, loads: Sequence[Load]) -> Round:
        chat = self.workloads["chat"]
        first = run_load(server.url, self.files.name, [replace(chat[0], output_tokens=1)], 1)
        if first.failed:
            raise ConfigError(f"{server.url} failed its first request: {', '.join(first.errors)}")
        round = Round(
            start_s=server.start_s, first_token_s=server.start_s + first.wall_s, memory_at_start=server.memory(),
            memory=0, loads=[],
        )  # fmt: skip
        run_load(server.url, self.files.name, chat[:WARMUP_REQUESTS], WARMUP_CONCURRENCY)
        for load in loads:
            requests = self.workloads[load.workload][: load.num_requests]
            disturbance = Disturbance(server)
            summary = run_load(server.url, self.files.name, requests, load.concurrency)
            round.loads.append(LoadResult(load=load.name, summary=summary, others_share=disturbance.share()))
            round.memory = max(round.memory, server.memory())
        return round


def _by_server(peer: Peer, loads: Sequence[Load]) -> list[list[Load]]:
    """Loads that one process of the peer takes, one after the other."""
    if not peer.restarts_per_load:
        return [list(loads)]
    in_order = sorted(loads, key=lambda load: load.concurrency)
    return [list(group) for _, group in groupby(in_order, key=lambda load: load.concurrency)]
