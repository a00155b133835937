"""llama.cpp's server, built for this machine from the source inside llama-cpp-python's source package.

Knows how to build and start it; nothing of how it works.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from bench.peers.base import PEERS, Home, Peer, Start, usable_cores
from servd.errors import ConfigError
from servd.hub.files import ModelFiles

VERSION = "0.3.36"
ENVIRONMENT = "llama-cpp"
CONTEXT_A_SLOT = 1024  # tokens: what the longest request of any set needs, and no cache that lies idle
BUILD_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip
PROGRAMS = ("llama-server", "llama-quantize")


class LlamaCpp(Peer):
    """`llama-server` on one type of weights."""

    restarts_per_load = True  # slots are fixed at the start, and unused ones cost speed

    def __init__(self, ggml_type: str) -> None:
        self.ggml_type = ggml_type
        self.weights = "bf16" if ggml_type == "BF16" else ggml_type
        self.name = f"llama.cpp-{self.weights}"

    def install(self, home: Home) -> None:
        """Fetch, unpack, compile: some minutes once."""
        home.environment(ENVIRONMENT, ["cmake"])
        home.once("build-llama.cpp", f"llama-cpp-python {VERSION} {' '.join(BUILD_FLAGS)}", lambda: _build(home))

    def prepare(self, home: Home, files: ModelFiles) -> None:
        """Decoded to bfloat16 by llama.cpp's own tool, and quantized from that."""
        bf16 = home.weights(files, "bf16.gguf")

        def quantize(source: Path, target: Path, ggml_type: str) -> None:
            threads = str(len(usable_cores()))
            tool = _program(home, "llama-quantize")
            home.call("quantize", [tool, "--allow-requantize", source, target, ggml_type, threads])

        home.convert(files, bf16.name, lambda: quantize(files.weights[0], bf16, "BF16"))
        if self.ggml_type != "BF16":
            target = self._file(home, files)
            home.convert(files, target.name, lambda: quantize(bf16, target, self.ggml_type))

    def start(self, home: Home, files: ModelFiles, port: int, concurrency: int) -> Start:
        """A slot for each request under way."""
        threads = str(len(usable_cores()))
        argv = [
            str(_program(home, "llama-server")), "-m", str(self._file(home, files)), "--alias", files.name,
            "-t", threads, "-tb", threads, "-np", str(concurrency), "-c", str(CONTEXT_A_SLOT * concurrency),
            "--no-webui", "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        return Start(argv, {"GOMP_SPINCOUNT": "2000"}, f"{CONTEXT_A_SLOT} tokens a slot, a slot a request")

    def version(self, home: Home) -> str:
        """Of the package that carried the source."""
        return f"llama.cpp of llama-cpp-python {VERSION}"

    def _file(self, home: Home, files: ModelFiles) -> Path:
        return home.weights(files, f"{self.weights.lower()}.gguf")


def _program(home: Home, name: str) -> Path:
    return home.folder / "build" / "llama.cpp" / "bin" / name


def _build(home: Home) -> None:
    source = _source(home)
    build = home.folder / "build" / "llama.cpp"
    cmake = home.python(ENVIRONMENT).parent / "cmake"
    home.call("build-llama.cpp", [cmake, "-S", source, "-B", build, *BUILD_FLAGS])
    home.call("build-llama.cpp", [cmake, "--build", build, "-j", str(len(usable_cores())), "--target", *PROGRAMS])


def _source(home: Home) -> Path:
    """The folder of llama.cpp, fetched if need be."""
    folder = home.folder / "source"
    package = folder / f"llama_cpp_python-{VERSION}"
    archive = folder / f"{package.name}.tar.gz"
    if not archive.is_file():
        python, package_name = str(home.python(ENVIRONMENT)), f"llama-cpp-python=={VERSION}"
        pip = [python, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        home.call("build-llama.cpp", [*pip, package_name])
    shutil.rmtree(package, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = package / "vendor" / "llama.cpp"
    if not (source / "CMakeLists.txt").is_file():
        raise ConfigError(f"{archive} holds no vendor/llama.cpp; llama-cpp-python {VERSION} is needed")
    return source


for _ggml_type in ("BF16", "Q4_0"):
    _peer = LlamaCpp(_ggml_type)
    PEERS.register(_peer.name)(_peer)
