"""Owns the compilation of the package's C++ files into one shared library, several instruction sets in it.
Does not know what is in them, nor torch: the build backend loads this file by its path, so stdlib only."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "_lib" / "libservd_kernels.so"
FINGERPRINT = LIBRARY.with_suffix(".sha256")
OBJECTS = LIBRARY.parent / "objects"  # compiled files, by the hash of all they are made from

# Best first: the order of the automatic choice. A wheel moves between machines: never -march=native.
ISA_FLAGS: dict[str, list[str]] = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni "
    "-mavx2 -mfma -mf16c -mprefer-vector-width=512".split(),
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}

# -ffp-contract=off: the same rounding wherever a template is inlined (see common/simd.hpp).
# -Wno-maybe-uninitialized: GCC 12's own AVX-512 headers trip it.
CXX_FLAGS = (
    "-std=gnu++17 -O3 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -ffp-contract=off "
    "-fno-math-errno -Wall -Wextra -Wno-maybe-uninitialized"
).split()

COMPILER_HELP = "install a C++17 compiler (Debian: apt install g++; macOS: xcode-select --install)"


def isas() -> list[str]:
    """The instruction sets that the library holds on this kind of machine, best first."""
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]


def find_compiler() -> str | None:
    """$CXX or c++, if it can be found."""
    return shutil.which(_compiler_name())


def _compiler_name() -> str:
    return os.environ.get("CXX") or "c++"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.cpp"))


def fingerprint() -> str:
    """A hash of all that the library is made from. Not file times: a checkout or a wheel sets them anew."""
    digest = hashlib.sha256(platform.machine().encode())  # a home folder may be shared by machines of two kinds
    for path in [*sources(), *sorted(PACKAGE.rglob("*.hpp")), Path(__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def is_fresh() -> bool:
    """Whether the library is whole, and made from the files as they are now or shipped without them."""
    if not LIBRARY.exists() or not sources():
        return LIBRARY.exists()
    return FINGERPRINT.exists() and FINGERPRINT.read_text() == _mark(LIBRARY)


def _mark(library: Path) -> str:
    """What FINGERPRINT holds beside `library`. Its own hash is in it: loading half a file ends in a bus error."""
    return f"{fingerprint()} {hashlib.sha256(library.read_bytes()).hexdigest()}"


def compile_library() -> Path | None:
    """Builds the library if it is missing or old; its path, or None (logged) if this machine cannot."""
    if is_fresh():
        return LIBRARY
    compiler = find_compiler()
    if compiler is None:
        logger.warning(
            "no C++ compiler (%s is not found): servd runs on the slow reference kernels; %s",
            _compiler_name(),
            COMPILER_HELP,
        )
        return None
    try:
        LIBRARY.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=LIBRARY.parent) as folder:
            built = _build(compiler, Path(folder))
            mark = Path(folder) / FINGERPRINT.name
            mark.write_text(_mark(built))
            os.replace(built, LIBRARY)
            os.replace(mark, FINGERPRINT)
    except subprocess.CalledProcessError as error:
        logger.warning("the C++ kernels did not compile with %s:\n%s", compiler, error.stderr)
        return None
    except OSError as error:
        logger.warning("the C++ kernels could not be written: %s", error)
        return None
    return LIBRARY


def _build(compiler: str, folder: Path) -> Path:
    OBJECTS.mkdir(exist_ok=True)
    jobs: dict[Path, list[str]] = {}
    for source in sources():
        # What lies in common/ is compiled once; an op's file once for each instruction set.
        is_common = source.parent.name == "common"
        for isa in ["portable"] if is_common else isas():
            command = [compiler, *CXX_FLAGS, f"-DSERVD_ISA={isa}", *ISA_FLAGS[isa], "-c", str(source)]
            name = f"{source.parent.name}_{source.stem}_{isa}"
            jobs[OBJECTS / f"{name}_{_object_hash(source, command)}.o"] = command
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        list(executor.map(lambda target: _compile_object(jobs[target], target, folder), jobs))
    for stale in set(OBJECTS.iterdir()) - jobs.keys():
        stale.unlink()
    library = folder / LIBRARY.name
    strip = ["-Wl,--as-needed,-s"] if sys.platform == "linux" else []
    _run([compiler, "-shared", "-pthread", *map(str, jobs), *strip, "-o", str(library)])
    return library


def _object_hash(source: Path, command: list[str]) -> str:
    """Of the command, the source, and every header that it can see: those beside it and those in common/."""
    digest = hashlib.sha256(" ".join(command).encode())
    headers = {*source.parent.glob("*.hpp"), *(PACKAGE / "common").glob("*.hpp")}
    for path in [source, *sorted(headers)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile_object(command: list[str], target: Path, folder: Path) -> None:
    if target.exists():
        return
    built = folder / target.name
    _run([*command, "-o", str(built)])
    os.replace(built, target)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(0 if compile_library() else 1)
