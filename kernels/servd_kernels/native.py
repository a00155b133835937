"""Owns the compiled library: loading it, choosing the instruction set, typed access to its functions.
Does not know any op: each op's cpu.py declares the functions that it calls."""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from servd_kernels import build

ISA_VARIABLE = "SERVD_CPU_ISA"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType of common/simd.hpp
_ISA_CODES = {"portable": 0, "avx2": 1, "avx512": 2}  # servd_cpu_supports of common/pool.cpp
_TYPES = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "i": ctypes.c_int,
}


class Library:
    """The loaded library and the instruction set in use."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self.handle = handle
        self.isas = [isa for isa in build.isas() if handle.servd_cpu_supports(_ISA_CODES[isa])]
        self.isa = self.isas[0]
        self.functions: list[Function] = []


class Function:
    """One function of the library. `call` is the ctypes function of the instruction set in use: kernels take
    it from here at each call, which costs one attribute, and `select_isa` replaces it."""

    __slots__ = ("call", "name", "result", "types")

    def __init__(self, name: str, types: str, result: str = "i") -> None:
        """`types` and `result` spell the C types: p pointer, l int64, f float, i int."""
        self.name = name
        self.types = [_TYPES[letter] for letter in types]
        self.result = _TYPES[result]
        self.call: Callable[..., int] = self._missing
        loaded = library()
        if loaded is not None:
            loaded.functions.append(self)
            self.point_at(loaded)

    def point_at(self, loaded: Library) -> None:
        function: Any = loaded.handle[f"servd_{loaded.isa}_{self.name}"]
        function.argtypes = self.types
        function.restype = self.result
        self.call = function

    def _missing(self, *_: object) -> int:
        raise RuntimeError(missing_reason())


_loading = threading.Lock()


def library() -> Library | None:
    """The library, compiled first if it is missing or older than its sources; None if that cannot be done.

    Threads that ask together get the same one: two would have two pools and two instruction sets in use.
    """
    with _loading:
        return _load()


@functools.cache
def _load() -> Library | None:
    path = build.compile_library()
    if path is None:
        return None
    loaded = Library(ctypes.CDLL(str(path)))
    if hasattr(os, "sched_getaffinity"):
        loaded.handle.servd_set_num_threads(len(os.sched_getaffinity(0)))
    asked = os.environ.get(ISA_VARIABLE)
    if asked:
        _select(loaded, asked)
    return loaded


def missing_reason() -> str | None:
    """Why there are no native kernels, with the remedy; None if there are."""
    if library() is not None:
        return None
    return f"the compiled kernels are missing: {build.COMPILER_HELP}, then start again"


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """The part of `supports` that all native kernels share."""
    if torch.device(device).type != "cpu":
        return f"it runs on cpu, not on {device}"
    if dtype not in DTYPES:
        return f"it knows {', '.join(map(str, DTYPES))}, not {dtype}"
    return missing_reason()


def isas() -> list[str]:
    """The instruction sets that the library holds and this processor runs, best first."""
    loaded = library()
    return loaded.isas if loaded else []


def select_isa(name: str) -> None:
    """Switches every kernel to another instruction set (for tests). Packed weights keep the one they have."""
    loaded = library()
    if loaded is None:
        raise ValueError(str(missing_reason()))
    _select(loaded, name)


def _select(loaded: Library, name: str) -> None:
    if name not in loaded.isas:
        known = ", ".join(loaded.isas)
        raise ValueError(f"{ISA_VARIABLE}={name}: not on this processor; it runs: {known}")
    loaded.isa = name
    for function in loaded.functions:
        function.point_at(loaded)


def set_num_threads(threads: int) -> None:
    """Sets how many threads the kernels use, the caller included."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    loaded = library()
    if loaded is not None:
        loaded.handle.servd_set_num_threads(threads)


def num_threads() -> int:
    """How many threads the kernels use; 1 without the library."""
    loaded = library()
    return int(loaded.handle.servd_num_threads()) if loaded else 1
