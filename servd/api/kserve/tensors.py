"""Tensors as the protocol has them: names, datatypes, shapes, and values as bytes.

Knows nothing of what a tensor means to a model.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from servd.errors import InvalidRequestError

_LENGTH = struct.Struct("<I")  # leads each BYTES value
_FORMATS = {"BOOL": "?", "UINT32": "I", "FP32": "f"}  # struct's codes; all little-endian
DATATYPES = ("BYTES", *_FORMATS)


@dataclass(frozen=True, slots=True)
class Tensor:
    """Values in row-major order: bytes for BYTES, else Python's bool, int or float."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes or gives under a name; a dimension of -1 may have any size."""

    name: str
    datatype: str
    shape: tuple[int, ...] = (1,)


def num_values(shape: Sequence[int]) -> int:
    """How many values a tensor of the shape has."""
    product = 1
    for size in shape:
        product *= size
    return product


def encode(tensor: Tensor) -> bytes:
    """A tensor's values as bytes; each BYTES value is led by its length."""
    if tensor.datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(value)) + value for value in tensor.values)
    return struct.pack(f"<{len(tensor.values)}{_FORMATS[tensor.datatype]}", *tensor.values)


def decode(data: bytes, spec: TensorSpec, where: str) -> list[Any]:
    """The values of a tensor of that datatype and shape; `where` is what errors call the field.

    Raises InvalidRequestError if the bytes are not exactly those of such a tensor.
    """
    count = num_values(spec.shape)
    if spec.datatype == "BYTES":
        return _decode_bytes(data, count, spec.name, where)
    layout = struct.Struct(f"<{count}{_FORMATS[spec.datatype]}")
    if len(data) != layout.size:
        raise InvalidRequestError(
            f"{where} ({spec.name}) has {len(data)} bytes; allowed: {layout.size}, for shape {list(spec.shape)} of "
            f"{spec.datatype}",
            param=where,
        )
    return list(layout.unpack(data))


def _decode_bytes(data: bytes, count: int, name: str, where: str) -> list[bytes]:
    values: list[bytes] = []
    start = 0
    while start < len(data) and len(values) < count:
        if len(data) - start < _LENGTH.size:
            break
        begin = start + _LENGTH.size
        end = begin + _LENGTH.unpack_from(data, start)[0]
        if end > len(data):
            break
        values.append(data[begin:end])
        start = end
    if start != len(data) or len(values) != count:
        raise InvalidRequestError(
            f"{where} ({name}) has {len(data)} bytes, which are not {count} BYTES values; allowed: each led by its "
            "length as 4 bytes, little-endian",
            param=where,
        )
    return values
