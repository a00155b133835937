"""Owns recorded steps: the native calls of a function, kept with their arguments and run again without Python.
Does not know models: the CPU's twin of a CUDA graph, for a function of tensors that stay where they are."""

import ctypes
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from servd_kernels import native

_ALIGNMENT = 64
_SLOT = {"p": "q", "l": "q", "i": "q", "f": "fxxxx"}
# What a step may ask of torch besides memory: to look at a tensor in another shape (checked: no copy), and its numbers.
_VIEWS = set(
    "view __getitem__ reshape flatten unflatten transpose permute t unbind chunk split narrow select squeeze unsqueeze "
    "expand contiguous view_as to".split()
)
_NUMBERS = set(
    "__get__ stride size dim is_contiguous data_ptr __len__ numel element_size storage_offset device".split()
)


class NotRecordableError(Exception):
    """The function computes something that is not a native call, so that it cannot be recorded."""


class StepFailedError(RuntimeError):
    """A call of a replayed step reported a fault, such as a position that is out of range."""


class Arena:
    """Memory for the tensors that recorded steps make. Steps that never run at once share one: what a step leaves
    is overwritten by the next."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray[Any, np.dtype[np.uint8]]] = []

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.size for buffer in self._buffers)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the smallest buffer that no tensor uses and that is large enough; a new one if there is none."""
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return torch.frombuffer(bytearray(1), dtype=torch.uint8)[:0].view(dtype).view(shape)
        size = count * dtype.itemsize
        for buffer in self._buffers:
            # A tensor holds a reference to its buffer for as long as it or a view of it lives.
            if buffer.size >= size and sys.getrefcount(buffer) == 3:  # the list's, this name's, the argument's
                break
        else:
            buffer = _aligned(size)
            self._buffers.append(buffer)
            self._buffers.sort(key=lambda buffer: buffer.size)
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def _aligned(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    whole = np.zeros(size + _ALIGNMENT, np.uint8)
    offset = -whole.ctypes.data % _ALIGNMENT
    return whole[offset : offset + size]


class _Allocations(TorchFunctionMode):
    """While active, tensors come out of an arena, and any other work of torch's own is refused.

    A TorchDispatchMode would see one layer deeper, but its first call imports torch._dynamo, which takes a second.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty_like:
            return self._arena.empty(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if func is torch.empty:
            shape = args if isinstance(args[0], int) else args[0]
            return self._arena.empty(shape, kwargs.get("dtype") or torch.get_default_dtype())
        name = func.__name__
        if name in _NUMBERS:
            return func(*args, **kwargs)
        if name not in _VIEWS:
            raise NotRecordableError(f"it calls torch's {name}")
        result = func(*args, **kwargs)
        memory = args[0].untyped_storage().data_ptr()
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if tensor.untyped_storage().data_ptr() != memory:
                raise NotRecordableError(f"it copies a tensor, in torch's {name}")
        return result


class Recorder:
    """Records functions, one at a time, on one arena."""

    def __init__(self) -> None:
        self._arena = Arena()

    def __call__(self, step: Callable[[], torch.Tensor]) -> "Recording":
        """Run `step` once, recording. What it reads must stay where it is.

        Raises NotRecordableError, and what `step` raises.
        """
        program: list[bytes] = []
        with _Allocations(self._arena), native.intercept(lambda function: _recorded(function, program)):
            output = step()
        return Recording(b"".join(program), len(program), output, self._arena)


def _recorded(function: native.Function, program: list[bytes]) -> Callable[..., int]:
    call = function.call
    slots = struct.Struct("=" + "".join(_SLOT[letter] for letter in function.types))

    def record(*arguments: Any) -> int:
        address = _slots_address(function)
        if address is None:
            raise NotRecordableError(f"{function.name} has no form that can be recorded")
        packed = slots.pack(*(0 if argument is None else argument for argument in arguments))
        program.append(struct.pack("=qq", address, len(arguments)) + packed)
        return call(*arguments)

    return record


def _slots_address(function: native.Function) -> int | None:
    """Where the function over slots is; None if the library has none."""
    loaded = native.library()
    assert loaded is not None, "a native function without its library"
    try:
        found = loaded.handle[f"servd_{function.isa or loaded.isa}_{function.name}_slots"]
    except AttributeError:
        return None
    return ctypes.cast(found, ctypes.c_void_p).value


class Recording:
    """A recorded step. Its output is overwritten by each replay, and by other recordings of the same recorder."""

    __slots__ = ("_address", "_arena", "_program", "_replay", "num_calls", "output")

    def __init__(self, program: bytes, num_calls: int, output: torch.Tensor, arena: Arena) -> None:
        loaded = native.library()
        assert loaded is not None, "a recorded step without the library"
        self._program = np.frombuffer(program, np.int64)
        self._address = self._program.ctypes.data
        self._arena = arena  # the calls write to its memory
        self._replay = loaded.replay
        self.num_calls = num_calls
        self.output = output

    def replay(self) -> torch.Tensor:
        """Do the same work again. Raises StepFailedError where a call reports a fault."""
        fault = self._replay(self._address, self.num_calls)
        if fault >= 0:
            raise StepFailedError(f"call {fault} of {self.num_calls} of a recorded step reported a fault")
        return self.output
