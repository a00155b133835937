"""Translates a GGUF file's metadata once into a sidecar folder in Hugging Face form; later starts read only that.

Owns the folder's key and its atomic creation. Knows nothing of catalogues or of loading weights.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from servd.errors import ConfigError
from servd.hub.files import CHOOSE_HOME, ModelFiles, servd_home
from servd.hub.gguf_check import GGUFTensor, check_gguf

SIDECAR_VERSION = 1  # raise it when the translation changes: older sidecars are then made anew
TENSOR_INDEX = "tensors.json"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", TENSOR_INDEX)


def gguf_model_files(path: Path, name: str | None = None) -> ModelFiles:
    """The model in the .gguf file `path`, its sidecar made on first sight (about 3 s for 50 k tokens).

    Raises ConfigError for a malformed file, an unknown architecture or tokenizer, or a full disk.
    """
    path = path.resolve()
    try:
        stat = path.stat()
        key = hashlib.sha256(f"{SIDECAR_VERSION}\n{path}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    folder = servd_home() / "gguf" / key
    if not _is_whole(folder):
        _create(path, folder)
    return ModelFiles(name or path.stem, folder, (path,), folder / TENSOR_INDEX)


def _is_whole(folder: Path) -> bool:
    # Not the folder alone: what cleans ~/.cache of old files may have taken some of these.
    return all((folder / name).is_file() for name in FILES)


def _create(path: Path, folder: Path) -> None:
    contents = _translate(path)
    try:
        _store(contents, folder)
    except OSError as error:
        raise ConfigError(
            f"{folder.parent} cannot hold what servd reads from {path.name}: {error.strerror or error}; {CHOOSE_HOME}"
        ) from error


def _translate(path: Path) -> dict[str, str]:
    """The sidecar's files: name to text."""
    from servd.hub.gguf_config import MetadataError, hf_config
    from servd.hub.gguf_tokenizer import build_tokenizer

    tensors = check_gguf(path)
    try:
        metadata = _read_metadata(path)
        if metadata.get("split.count", 0) not in (0, 1):
            raise MetadataError("it is one part of a split model; join the parts with llama-gguf-split --merge")
        config = hf_config(metadata, tensors, _rope_freqs(path, tensors))
        tokenizer, tokenizer_config = build_tokenizer(metadata)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (MetadataError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path} cannot be served: {error}") from error
    return {
        "config.json": _json(config),
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": _json(tokenizer_config),
        TENSOR_INDEX: _json([dataclasses.asdict(tensor) for tensor in tensors]),
    }


def _store(contents: dict[str, str], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        for name, text in contents.items():
            _write(scratch / name, text)
        scratch.chmod(0o755)  # mkdtemp's 0700 would shut out other users of a shared SERVD_HOME
        with contextlib.suppress(OSError):  # another process was faster, and its folder is as good
            os.rename(scratch, folder)
        if not _is_whole(folder):
            shutil.rmtree(folder)
            os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_metadata(path: Path) -> dict[str, Any]:
    """All metadata of a file that `check_gguf` has passed, as Python values."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def _rope_freqs(path: Path, tensors: list[GGUFTensor]) -> list[float]:
    for tensor in tensors:
        if tensor.name == "rope_freqs.weight" and tensor.ggml_type == "F32" and tensor.nbytes <= 1 << 16:
            values = array.array("f")
            with path.open("rb") as file:
                file.seek(tensor.offset)
                values.frombytes(file.read(tensor.nbytes))
            if sys.byteorder == "big":
                values.byteswap()
            return values.tolist()
    return []


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
