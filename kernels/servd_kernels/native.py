"""Owns the compiled library: loading it, choosing the instruction set, typed access to its functions.
Does not know any op: each op's cpu.py declares the functions that it calls."""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        self.replay: Any = handle.servd_replay  # of common/replay.cpp: address, number of calls → index of a fault
        self.replay.argtypes, self.replay.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64


class Function:
    """One function of the library. `call` is the ctypes function of the instruction set in use: kernels take
    it from here at each call, which costs one attribute; `select_isa` and `intercept` replace it."""

    __slots__ = ("_pinned", "call", "isa", "name", "result", "types")

    def __init__(self, name: str, types: str, result: str = "i", isa: str | None = None) -> None:
        """`types` and `result` spell the C types: p pointer, l int64, f float, i int; `isa`: always this one."""
        self.name = name
        self.types = types
        self.result = result
        self.isa = isa
        self._pinned: dict[str, Function] = {}
        self.call: Callable[..., int] = self._missing
        loaded = library()
        if loaded is not None:
            loaded.functions.append(self)
            self.point_at(loaded)

    def point_at(self, loaded: Library) -> None:
        function: Any = loaded.handle[f"servd_{self.isa or loaded.isa}_{self.name}"]
        function.argtypes = [_TYPES[letter] for letter in self.types]
        function.restype = _TYPES[self.result]
        self.call = function

    def pinned(self) -> "Function":
        """This function in the instruction set in use now, whatever is selected later: what packed weights hold."""
        loaded = library()
        isa = loaded.isa if loaded is not None else ""
        if isa not in self._pinned:
            self._pinned[isa] = Function(self.name, self.types, self.result, isa)
        return self._pinned[isa]

    def _missing(self, *_: object) -> int:
        raise RuntimeError(missing_reason())


_loading = threading.Lock()
_intercepting = threading.Lock()


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


@contextmanager
def intercept(wrap: Callable[[Function], Callable[..., int]]) -> Iterator[None]:
    """This thread's calls of every function go to `wrap(function)` instead, which finds the real one in
    `function.call`. Those of other threads go on; a thread that intercepts too waits for its turn."""
    loaded = library()
    with _intercepting:
        functions = list(loaded.functions) if loaded is not None else []
        calls = [function.call for function in functions]
        wrapped = [_in_this_thread(wrap(function), function.call) for function in functions]
        try:
            for function, call in zip(functions, wrapped, strict=True):
                function.call = call
            yield
        finally:
            for function, call in zip(functions, calls, strict=True):
                function.call = call


def _in_this_thread(wrapped: Callable[..., int], call: Callable[..., int]) -> Callable[..., int]:
    thread = threading.get_ident()
    return lambda *arguments: (wrapped if threading.get_ident() == thread else call)(*arguments)


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
