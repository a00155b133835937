"""servd itself, in the settings that the table compares.

Knows servd by its command line alone.
"""

from __future__ import annotations

import sys

import servd
from bench.peers.base import KV_GIB, MAX_MODEL_LEN, MAX_NUM_SEQS, PEERS, Home, Peer, Start, usable_cores
from servd.hub.catalogue import CATALOGUE
from servd.hub.files import ModelFiles


def model_argument(files: ModelFiles) -> str:
    """What a user types: the catalogue's name, whose recommendation then holds, or the file."""
    return files.name if files.name in CATALOGUE else str(files.weights[0])


class ServdPeer(Peer):
    """`servd serve` of this checkout with some flags."""

    def __init__(self, name: str, weights: str, *flags: str, scheduling: tuple[str, ...] = ()) -> None:
        self.name = name
        self.weights = weights
        self.flags = flags  # that change the weights or the cache: `servd eval` judges by them
        self.scheduling = scheduling  # flags that change no token

    def install(self, home: Home) -> None:
        """It runs already."""

    def prepare(self, home: Home, files: ModelFiles) -> None:
        """It reads the file as it is."""

    def start(self, home: Home, files: ModelFiles, port: int, concurrency: int) -> Start:
        """A user's defaults, but for the limits that all are given."""
        argv = [
            sys.executable, "-m", "servd.cli", "serve", model_argument(files), "--served-model-name", files.name,
            "--port", str(port), "--grpc-port", "-1", "--max-model-len", str(MAX_MODEL_LEN),
            "--max-num-seqs", str(MAX_NUM_SEQS), "--kv-cache-memory", f"{KV_GIB}GiB",
            "--threads", str(len(usable_cores())), *self.flags, *self.scheduling,
        ]  # fmt: skip
        return Start(argv, notes=" ".join([*self.flags, *self.scheduling]) or "defaults")

    def version(self, home: Home) -> str:
        """Of this checkout."""
        return f"servd {servd.__version__}"


for _peer in (
    ServdPeer("servd", "default: the fastest faithful form"),
    ServdPeer("servd-no-guesses", "as servd, no guesses", scheduling=("--num-speculative-tokens", "0")),
    ServdPeer("servd-bf16", "bf16", "--quantization", "none", "--dtype", "bfloat16"),
):
    PEERS.register(_peer.name)(_peer)
