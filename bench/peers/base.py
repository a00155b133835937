"""What a peer is: how it is installed, gets its weights, and is started; and where all of that is kept.

Knows nothing of load, results or any one engine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from servd.errors import ConfigError
from servd.hub.files import ModelFiles
from servd.registry import Registry

KV_GIB = 2  # memory for keys and values that each engine is given
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
GIB = 1 << 30


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use: each has a compute thread of every peer."""
    return sorted(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Home:
    """Environments, builds, weights and logs, kept between runs. Each finished step leaves a mark, so a broken-off
    installation goes on where it stopped."""

    folder: Path

    @classmethod
    def default(cls) -> Home:
        """$SERVD_BENCH_HOME, else ~/.cache/servd-bench."""
        return cls(Path(os.environ.get("SERVD_BENCH_HOME") or "~/.cache/servd-bench").expanduser().absolute())

    def python(self, name: str) -> Path:
        """The interpreter of the environment `name`."""
        return self.folder / "env" / name / "bin" / "python"

    def log(self, name: str) -> Path:
        """Where the process `name` writes."""
        path = self.folder / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def weights(self, files: ModelFiles, form: str) -> Path:
        """Where the model lies in this form: a file or a folder."""
        path = self.folder / "weights" / files.name / form
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def convert(self, files: ModelFiles, form: str, do: Callable[[], None]) -> None:
        """`once` for a form of the model; again if its file is another one."""
        source = files.weights[0]
        stat = source.stat()
        self.once(f"{files.name}-{form}", f"{source}, {stat.st_size} bytes of {stat.st_mtime_ns}", do)

    def once(self, step: str, what: str, do: Callable[[], None]) -> None:
        """Run `do` unless a step of this name was done with the same `what`."""
        mark = self.folder / "done" / step
        if mark.is_file() and mark.read_text(encoding="utf-8") == what:
            return
        sys.stderr.write(f"{step}: {what}\n")
        do()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(what, encoding="utf-8")

    def environment(self, name: str, requirements: Sequence[str], unwanted: Sequence[str] = ()) -> None:
        """A Python environment with these packages from PyPI, and without `unwanted` ones that they drag in.

        pip takes its index and its find-links from its own variables (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
        """

        def make() -> None:
            venv.create(self.folder / "env" / name, with_pip=True, symlinks=True)
            pip = [str(self.python(name)), "-m", "pip"]
            self.call(f"install-{name}", [*pip, "install", *requirements])
            if unwanted:
                self.call(f"install-{name}", [*pip, "uninstall", "-y", *unwanted])

        self.once(f"environment-{name}", " ".join(requirements), make)

    def call(self, log: str, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> None:
        """Run to the end, output appended to the log. Raises ConfigError that names the log if it fails."""
        path = self.log(log)
        with path.open("ab") as output:
            command = [str(part) for part in argv]
            done = subprocess.run(command, stdout=output, stderr=output, env={**os.environ, **(env or {})})
        if done.returncode != 0:
            raise ConfigError(f"{' '.join(command)} ended with {done.returncode}; see {path}")


@dataclass(frozen=True, slots=True)
class Start:
    """One process to start."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)  # beside the caller's own
    notes: str = ""  # what a reader of its figures should know


class Peer(ABC):
    """One engine with one kind of weights: a row of the table.

    Every peer serves greedy streaming `POST /v1/completions` over prompt token ids with `ignore_eos` and usage, and
    answers `GET /health` with 200 once it takes requests.
    """

    name: str  # the row's
    weights: str  # in words, e.g. "bf16"
    kv_bytes_at_start = 0  # of the KV memory, what is resident before any request
    restarts_per_load = False  # its settings depend on the concurrency

    @abstractmethod
    def install(self, home: Home) -> None:
        """Everything but the weights. Cheap if it is there already. Raises ConfigError."""

    @abstractmethod
    def prepare(self, home: Home, files: ModelFiles) -> None:
        """The model in the form the engine reads. Cheap if it is there already. Raises ConfigError."""

    @abstractmethod
    def start(self, home: Home, files: ModelFiles, port: int, concurrency: int) -> Start:
        """The server's command; it is to use a thread on each of `usable_cores()` and KV_GIB of KV memory."""

    def version(self, home: Home) -> str:
        """The engine's name and version."""
        return self.name


PEERS: Registry[Peer] = Registry("peer", "bench.peers.engines")


def choose(names: Iterable[str]) -> list[Peer]:
    """The peers of these names, or all, in the table's order. Raises ConfigError naming the known ones."""
    known = PEERS.discover()
    return [PEERS.get(name) for name in (names or known)]
