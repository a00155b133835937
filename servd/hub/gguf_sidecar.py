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
from servd.hub.files import ModelFiles, servd_home
from servd.hub.gguf_check import GGUFTensor, check_gguf

SIDECAR_VERSION = 1  # raise it when the translation changes: older sidecars are then made anew
TENSOR_INDEX = "tensors.json"


def gguf_model_files(path: Path, name: str | None = None) -> ModelFiles:
    """The model in the .gguf file `path`, its sidecar made on first sight (about 3 s for 50 k tokens).

    Raises ConfigError for a malformed file, an unknown architecture or tokenizer, or a full disk.
    """
    path = path.resolve()
    try:
        stat = path.stat()
        key = hashlib.sha256(f"{SIDECAR_VERSION}\n{path}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
        folder = servd_home() / "gguf" / key
        if not folder.is_dir():
            _create(path, folder)
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror or error}") from error
    return ModelFiles(name or path.stem, folder, (path,), folder / TENSOR_INDEX)


def _create(path: Path, folder: Path) -> None:
    from servd.hub.gguf_config import MetadataError, hf_config
    from servd.hub.gguf_tokenizer import build_tokenizer

    tensors = check_gguf(path)
    try:
        metadata = _read_metadata(path)
        if metadata.get("split.count", 0) not in (0, 1):
            raise MetadataError("it is one part of a split model; join the parts with llama-gguf-split --merge")
        config = hf_config(metadata, tensors, _rope_freqs(path, tensors))
        tokenizer, tokenizer_config = build_tokenizer(metadata)
    except (MetadataError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path} cannot be served: {error}") from error

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        _write_json(scratch / "config.json", config)
        _write_json(scratch / "tokenizer_config.json", tokenizer_config)
        _write_json(scratch / TENSOR_INDEX, [dataclasses.asdict(tensor) for tensor in tensors])
        _write(scratch / "tokenizer.json", tokenizer.to_str())
        scratch.chmod(0o755)  # mkdtemp's 0700 would shut out other users of a shared SERVD_HOME
        with contextlib.suppress(OSError):  # another process was faster, and its folder is as good
            os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not folder.is_dir():
        raise ConfigError(f"{folder} could not be created")


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


def _write_json(path: Path, value: object) -> None:
    _write(path, json.dumps(value, ensure_ascii=False))


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
