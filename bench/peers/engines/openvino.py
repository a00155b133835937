"""OpenVINO GenAI's continuous batching, on weights that its own tools converted to int8.

Knows how to install and start it; its HTTP front is fronts/openvino_http.py.
"""

from __future__ import annotations

from pathlib import Path

from bench.hf_checkpoint import write_checkpoint
from bench.peers.base import KV_GIB, MAX_NUM_SEQS, PEERS, Home, Peer, Start, usable_cores
from servd.hub.files import ModelFiles

VERSION = "2026.4.1"
ENVIRONMENT = "openvino"
REQUIREMENTS = (
    f"openvino-genai=={VERSION}", "openvino-tokenizers", "optimum-intel", "nncf", "torch==2.13.0", "aiohttp",
)  # fmt: skip
FRONT = Path(__file__).parent.parent / "fronts" / "openvino_http.py"


class OpenVino(Peer):
    """ContinuousBatchingPipeline on int8 weights, bfloat16 computation and its default KV type."""

    name = "openvino-int8"
    weights = "int8"

    def install(self, home: Home) -> None:
        """The engine and its converter in one environment."""
        home.environment(ENVIRONMENT, REQUIREMENTS, ["torchvision"])  # a CUDA build on PyPI, of no use here

    def prepare(self, home: Home, files: ModelFiles) -> None:
        """Hugging Face folder to OpenVINO's own format, weights quantized per channel."""
        source, target = home.weights(files, "hf-bf16"), home.weights(files, "openvino-int8")
        home.convert(files, source.name, lambda: write_checkpoint(files, source))
        optimum = home.python(ENVIRONMENT).parent / "optimum-cli"
        argv: list[str | Path] = [
            optimum, "export", "openvino", "-m", source, "--task", "text-generation-with-past",
            "--weight-format", "int8", target,
        ]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1"}
        home.convert(files, target.name, lambda: home.call("export-openvino", argv, env=offline))

    def start(self, home: Home, files: ModelFiles, port: int, concurrency: int) -> Start:
        """The front, which starts the engine in its own process."""
        argv = [
            str(home.python(ENVIRONMENT)), str(FRONT), str(home.weights(files, "openvino-int8")),
            "--model", files.name, "--port", str(port), "--threads", str(len(usable_cores())),
            "--cache-gib", str(KV_GIB), "--max-num-seqs", str(MAX_NUM_SEQS),
        ]  # fmt: skip
        return Start(argv, notes="behind a small HTTP front of our own")

    def version(self, home: Home) -> str:
        """As installed."""
        return f"OpenVINO GenAI {VERSION}"


PEERS.register(OpenVino.name)(OpenVino())
