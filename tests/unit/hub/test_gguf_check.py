"""Malformed GGUF files are refused with the reason, before anything is allocated for them."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servd.errors import ConfigError
from servd.hub.gguf_check import check_gguf
from servd.hub.gguf_sidecar import gguf_model_files

GGUFMaker = Callable[..., Path]
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def header(n_tensors: int = 0, n_kv: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_kv)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(b"t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


MALFORMED = {
    "empty": (b"", "less than a GGUF header"),
    "zip": (header(magic=b"PK\3\4"), "begins with"),
    "version": (header(version=1), "version is 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "n_tensors": (header(n_tensors=1 << 63) + bytes(64), "n_tensors is 9223372036854775808"),
    "n_kv": (header(n_kv=1 << 63) + bytes(64), "n_kv is 9223372036854775808"),
    "key length": (header(n_kv=1) + struct.pack("<Q", 1 << 62) + bytes(64), "length of a metadata key"),
    "string length": (header(n_kv=1) + string(b"k") + struct.pack("<IQ", 8, (1 << 64) - 1) + bytes(8), "ends within k"),
    "array length": (header(n_kv=1) + string(b"k") + struct.pack("<IIQ", 9, 0, 1 << 62) + bytes(8), "elements"),
    "array beyond the end": (header(n_kv=1) + string(b"k") + struct.pack("<IIQ", 9, 4, 1000), "ends within k"),
    "nested array": (header(n_kv=1) + string(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(32), "array of type 9"),
    "value type": (header(n_kv=1) + string(b"k") + struct.pack("<I", 99) + bytes(8), "type of k is 99"),
    "key twice": (header(n_kv=2) + (string(b"k") + struct.pack("<IB", 0, 1)) * 2 + bytes(16), "occurs twice"),
    "key not UTF-8": (header(n_kv=1) + string(b"\xff\xfe") + struct.pack("<IB", 0, 1), "not UTF-8"),
    "alignment": (header(n_kv=1) + string(b"general.alignment") + struct.pack("<II", 4, 3), "power of two"),
    "dims": (header(n_tensors=1) + tensor([1] * 9) + bytes(64), "9 dimensions"),
    "dims overflow": (header(n_tensors=1) + tensor([1 << 32, 1 << 32]) + bytes(64), "truncated or corrupt"),
    "zero dim": (header(n_tensors=1) + tensor([32, 0]) + bytes(64), "takes 0 bytes"),
    "type": (header(n_tensors=1) + tensor([32], kind=4242) + bytes(64), "unknown type 4242"),
    "odd row": (header(n_tensors=1) + tensor([33], kind=3) + bytes(64), "Q4_1 needs 32s"),
    "offset": (header(n_tensors=1) + tensor([32], offset=1 << 40) + bytes(256), "truncated or corrupt"),
    "unaligned": (header(n_tensors=1) + tensor([32], offset=4) + bytes(256), "not aligned"),
    "tensor twice": (header(n_tensors=2) + tensor([4]) * 2 + bytes(256), "tensor t occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_named_with_the_reason(tmp_path: Path, home: Path, case: str) -> None:
    content, reason = MALFORMED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        check_gguf(path)  # imports happen here, not under the measurement
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as raised:
            gguf_model_files(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in raised.value.message
    assert reason in raised.value.message
    assert peak < 8 << 20, f"{peak} bytes were allocated for a file of {len(content)} bytes"


@SETTINGS
@given(data=st.data())
def test_every_truncation_is_refused(make_gguf: GGUFMaker, home: Path, data: st.DataObject) -> None:
    whole = make_gguf().read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    path = make_gguf().with_name("cut.gguf")
    path.write_bytes(whole[:cut])
    with pytest.raises(ConfigError):
        gguf_model_files(path)


@SETTINGS
@given(data=st.data())
def test_flipped_bits_give_a_model_or_a_config_error(make_gguf: GGUFMaker, home: Path, data: st.DataObject) -> None:
    content = bytearray(make_gguf().read_bytes())
    metadata_end = content.index(b"token_embd.weight") + 64
    for position in data.draw(st.lists(st.integers(0, metadata_end), min_size=1, max_size=4)):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    path = make_gguf().with_name("flipped.gguf")
    path.write_bytes(bytes(content))
    try:
        files = gguf_model_files(path)
    except ConfigError as error:
        assert str(path) in error.message
    else:
        assert files.config()["vocab_size"] > 0
