"""Walks a GGUF file's structure, every length checked against the file's size, before anything trusts it.

Owns the tensor table (bounds, byte counts). Knows nothing of what metadata means: `gguf.GGUFReader` reads that, but
it loops over a corrupt array length and allocates as it goes, so it only ever sees files that passed here.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from servd.errors import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES = 24  # magic, version, n_tensors, n_kv
MIN_TENSOR_BYTES = 32  # name length, n_dims, one dim, type, offset
MIN_KV_BYTES = 13  # key length, type, one byte of value
MAX_ARRAY_ELEMENTS = 1 << 22  # over all arrays; the largest vocabularies need about 1.4 million
MAX_NAME_BYTES = 1 << 16
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
TYPE_STRING, TYPE_ARRAY, TYPE_UINT32 = 8, 9, 4
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One row of the tensor table."""

    name: str
    ggml_type: str  # "Q4_1", "F32", …
    shape: tuple[int, ...]  # numpy order, outermost first
    offset: int  # bytes from the start of the file
    nbytes: int


def check_gguf(path: Path) -> list[GGUFTensor]:
    """The tensors of the file, in its order. Raises ConfigError naming the file and what is wrong with it."""
    try:
        size = path.stat().st_size
        if size < HEADER_BYTES:
            raise _Malformed(f"it has {size} bytes, which is less than a GGUF header")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walker(data, size).tensors()
    except _Malformed as problem:
        raise ConfigError(f"{path} is not a usable GGUF file: {problem}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None


class _Malformed(Exception):
    """The file breaks the format; the message says how."""


class _Walker:
    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data = data
        self.size = size
        self.position = 0
        self.alignment = DEFAULT_ALIGNMENT
        self.array_elements = 0

    def tensors(self) -> list[GGUFTensor]:
        num_tensors, num_kv = self._header()
        keys: set[str] = set()
        for _ in range(num_kv):
            key = self._name("a metadata key")
            if key in keys:
                raise _Malformed(f"metadata key {key!r} occurs twice")
            keys.add(key)
            self._value(key)
        rows = [self._tensor_info() for _ in range(num_tensors)]
        start = -(-self.position // self.alignment) * self.alignment
        return self._placed(rows, start)

    def _header(self) -> tuple[int, int]:
        if (magic := self.data[:4]) != MAGIC:
            raise _Malformed(f"it begins with {magic!r} instead of {MAGIC!r}")
        self.position = 4
        version = self._number("<I", "the version")
        if version not in VERSIONS:
            why = "big-endian files are not supported" if version & 0xFFFF == 0 else "allowed: 2 and 3"
            raise _Malformed(f"its version is {version}; {why}")
        num_tensors = self._number("<Q", "n_tensors")
        num_kv = self._number("<Q", "n_kv")
        for name, count, least in (("n_tensors", num_tensors, MIN_TENSOR_BYTES), ("n_kv", num_kv, MIN_KV_BYTES)):
            if count * least > self.size:
                raise _Malformed(f"{name} is {count}; a file of {self.size} bytes cannot hold so many")
        return num_tensors, num_kv

    def _skip(self, count: int, what: str) -> int:
        """Move past `count` bytes; their start. Never moves beyond the end of the file."""
        start = self.position
        if count > self.size - start:
            raise _Malformed(f"it ends within {what} ({count} bytes at offset {start}, file size {self.size})")
        self.position = start + count
        return start

    def _number(self, kind: str, what: str) -> int:
        start = self._skip(struct.calcsize(kind), what)
        value: int = struct.unpack_from(kind, self.data, start)[0]
        return value

    def _name(self, what: str) -> str:
        length = self._number("<Q", what)
        if length > MAX_NAME_BYTES:
            raise _Malformed(f"the length of {what} is {length}; allowed: at most {MAX_NAME_BYTES}")
        start = self._skip(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise _Malformed(f"{what} at offset {start} is not UTF-8") from None

    def _value(self, key: str) -> None:
        kind = self._number("<I", f"the type of {key}")
        if kind == TYPE_ARRAY:
            self._array(key)
        elif kind == TYPE_STRING:
            self._skip(self._number("<Q", key), key)
        elif kind in SCALAR_BYTES:
            start = self._skip(SCALAR_BYTES[kind], key)
            if key == "general.alignment":
                self._set_alignment(kind, start)
        else:
            raise _Malformed(f"the type of {key} is {kind}, which is unknown")

    def _set_alignment(self, kind: int, start: int) -> None:
        self.alignment = struct.unpack_from("<I", self.data, start)[0] if kind == TYPE_UINT32 else 0
        if self.alignment == 0 or self.alignment & (self.alignment - 1):
            raise _Malformed(f"general.alignment is {self.alignment}; it must be a power of two")

    def _array(self, key: str) -> None:
        kind = self._number("<I", key)
        count = self._number("<Q", key)
        if kind not in SCALAR_BYTES and kind != TYPE_STRING:
            raise _Malformed(f"{key} is an array of type {kind}; allowed: numbers and strings")
        self.array_elements += count
        if self.array_elements > MAX_ARRAY_ELEMENTS:
            raise _Malformed(f"{key} brings its arrays to {self.array_elements} elements; limit {MAX_ARRAY_ELEMENTS}")
        if kind in SCALAR_BYTES:
            self._skip(count * SCALAR_BYTES[kind], key)
            return
        for _ in range(count):
            self._skip(self._number("<Q", key), key)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("a tensor name")
        num_dims = self._number("<I", name)
        if not 1 <= num_dims <= MAX_DIMS:
            raise _Malformed(f"tensor {name} has {num_dims} dimensions; allowed: 1 to {MAX_DIMS}")
        dims = [self._number("<Q", name) for _ in range(num_dims)]
        kind = self._number("<I", name)
        offset = self._number("<Q", name)
        return name, tuple(reversed(dims)), kind, offset

    def _placed(self, rows: list[tuple[str, tuple[int, ...], int, int]], start: int) -> list[GGUFTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        names: set[str] = set()
        tensors = []
        for name, shape, kind, offset in rows:
            if name in names:
                raise _Malformed(f"tensor {name} occurs twice")
            names.add(name)
            try:
                ggml_type = GGMLQuantizationType(kind)
            except ValueError:
                raise _Malformed(f"tensor {name} has the unknown type {kind}") from None
            block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
            if shape[-1] == 0 or shape[-1] % block_size:
                raise _Malformed(f"tensor {name} has rows of {shape[-1]} values; {ggml_type.name} needs {block_size}s")
            nbytes = block_bytes
            for extent in (*shape[:-1], shape[-1] // block_size):
                nbytes *= extent  # Python integers: a product of absurd extents cannot wrap around
            if nbytes == 0 or offset % self.alignment or start + offset + nbytes > self.size:
                raise _Malformed(
                    f"tensor {name} {list(shape)} takes {nbytes} bytes at offset {start + offset}, which is not within "
                    f"the file's {self.size} bytes or not aligned to {self.alignment}: truncated or corrupt"
                )
            tensors.append(GGUFTensor(name, ggml_type.name, shape, start + offset, nbytes))
        return tensors
