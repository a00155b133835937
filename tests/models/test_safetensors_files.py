"""Malformed safetensors files: a ConfigError that names the file, before anything is allocated for what they claim.

Fault 28. Reading is the safetensors package's; these are the cases that it, and what we add, must refuse.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servd.errors import ConfigError
from servd.models.safetensors import SafetensorsFiles

SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def file_bytes(header: object, data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def with_a(**changes: Any) -> bytes:
    return file_bytes(GOOD | {"a": GOOD["a"] | changes})


HEADER = json.dumps(GOOD).encode()
MALFORMED = {
    "empty": b"",
    "no header": b"\x08\0\0\0",
    "length 2^63": file_bytes(GOOD, length=1 << 63),
    "length 2^64 - 1": file_bytes(GOOD, length=(1 << 64) - 1),
    "length over 100 MB": file_bytes(GOOD, length=200_000_000),
    "length over the file's": file_bytes(GOOD, length=10_000),
    "length too short": file_bytes(GOOD, length=len(HEADER) - 5),
    "length 0": file_bytes(b""),
    "not JSON": file_bytes(b"x" * 50),
    "not UTF-8": file_bytes(b"\xff" * 50),
    "an array": file_bytes([]),
    "deep": file_bytes(b"[" * 50_000),
    "offsets past the end": with_a(data_offsets=[0, 1 << 40]),
    "offsets reversed": with_a(data_offsets=[16, 0]),
    "offsets negative": with_a(data_offsets=[-16, 0]),
    "offsets of 2^64": with_a(data_offsets=[0, 1 << 64]),
    "offsets overlap": file_bytes(GOOD | {"b": GOOD["b"] | {"data_offsets": [8, 16]}}),
    "a gap": file_bytes(GOOD | {"b": GOOD["b"] | {"data_offsets": [20, 28]}}, bytes(28)),
    "bytes left over": file_bytes(GOOD, bytes(100)),
    "data cut off": file_bytes(GOOD, bytes(20)),
    "shape larger than the bytes": with_a(shape=[2, 3]),
    "shape of 2^62": with_a(shape=[1 << 62, 4]),
    "shape that overflows": with_a(shape=[1 << 32, 1 << 32]),
    "shape negative": with_a(shape=[-2, -2]),
    "shape of a fraction": with_a(shape=[2.5, 2]),
    "no shape": file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "dtype unknown": with_a(dtype="F33"),
    "dtype larger": with_a(dtype="F64"),
    "dtype is a number": with_a(dtype=4),
    "name twice": file_bytes(HEADER[:-1] + b', "a": ' + json.dumps(GOOD["a"]).encode() + b"}"),
    "name twice, escaped": file_bytes(HEADER[:-1] + b', "\\u0061": ' + json.dumps(GOOD["a"]).encode() + b"}"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_before_anything_is_allocated(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(MALFORMED[case])
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            list(SafetensorsFiles([path]).tensors(torch.float32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    assert peak < 8 << 20, f"{peak} bytes were allocated"


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(file_bytes({"__metadata__": {"format": "pt"}} | GOOD))
    tensors = dict(SafetensorsFiles([path]).tensors(torch.float32))
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {"a": [2, 2], "b": [4]}


def read_or_refuse(path: Path) -> None:
    try:
        tensors = list(SafetensorsFiles([path]).tensors(torch.float32))
    except ConfigError as error:
        assert str(path) in error.message or error.message.startswith("tensor ")
    else:
        assert sum(tensor.nbytes for _, tensor in tensors) <= path.stat().st_size


@SETTINGS
@given(data=st.data())
def test_flipped_and_cut_files_give_tensors_or_a_config_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(file_bytes(GOOD))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content))
    read_or_refuse(path)


NUMBERS = st.integers(-1, 40) | st.sampled_from([1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, -(1 << 63)]) | st.floats()
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "F8_E4M3", "BOOL", "X", ""]),
        "shape": st.lists(NUMBERS, max_size=4),
        "data_offsets": st.lists(NUMBERS, max_size=3),
        "extra": st.none(),
    },
)


@SETTINGS
@given(header=st.dictionaries(st.text(max_size=3), TENSOR, max_size=4), size=st.integers(0, 64))
def test_any_header_gives_tensors_or_a_config_error(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(file_bytes(header, bytes(size)))
    read_or_refuse(path)
