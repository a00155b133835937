"""Owns recorded steps: the native calls of a function, kept with their arguments and run again without Python.
Does not know models: the CPU's twin of a CUDA graph, but one recording serves steps of any size. It is made from
samples: what differs between them must be affine in their sizes, and the memory must be the same."""

import ctypes
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

# Rows and groups of the runs that a recording is made from: the first three tell how its arguments depend on them, the
# others prove it. Uncommon numbers, so that nothing else of a model has that size by chance.
_SAMPLES = ((11, 3), (17, 3), (17, 5), (1, 1), (29, 13))

Step = Callable[[int, int], torch.Tensor]
Words = np.ndarray[Any, np.dtype[np.int64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class NotRecordableError(Exception):
    """The function computes something that is not a native call, so that it cannot be recorded."""


class StepFailedError(RuntimeError):
    """A call of a replayed step reported a fault, such as a position that is out of range."""


@dataclass(slots=True)
class _Buffer:
    memory: Bytes
    # A view of the memory, which a tensor on it holds for as long as the tensor or a view of it lives.
    lease: Callable[[], Bytes | None] = lambda: None


class Arena:
    """Memory for the tensors that a recorded step makes, as large as the largest step needs; what one replay leaves
    there is overwritten by the next."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._buffers: list[_Buffer] = []
        self.rows = 0  # of the step that is recorded now: tensors of so many rows get room for `max_rows`
        self.sizes: list[int] = []  # bytes of each tensor made in it, in order

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the smallest buffer that no tensor uses and that is large enough; a new one if there is none."""
        count = int(np.prod(shape, dtype=np.int64))
        size = count * dtype.itemsize
        if len(shape) > 0 and shape[0] == self.rows:
            size = size // self.rows * self._max_rows
        self.sizes.append(size)
        if count == 0:
            raise NotRecordableError("it makes a tensor without elements")
        for buffer in self._buffers:
            if buffer.memory.size >= size and buffer.lease() is None:
                break
        else:
            buffer = _Buffer(_aligned(size))
            self._buffers.append(buffer)
            self._buffers.sort(key=lambda buffer: buffer.memory.size)
        lease = buffer.memory[:]
        buffer.lease = weakref.ref(lease)
        return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` [rows, ...], with all the rows that its buffer has room for: the memory is then never reused."""
        for buffer in self._buffers:
            lease = buffer.lease()
            if lease is not None and lease.ctypes.data == tensor.data_ptr() and tensor.is_contiguous():
                shape = (self._max_rows, *tensor.shape[1:])
                count = int(np.prod(shape, dtype=np.int64))
                return torch.frombuffer(lease, dtype=tensor.dtype, count=count).view(shape)
        raise NotRecordableError("its result is not a whole tensor that it made")


def _aligned(size: int) -> Bytes:
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


@dataclass(frozen=True, slots=True)
class _Sample:
    """The calls of one recorded run."""

    sizes: tuple[int, ...]  # what its program may depend on
    program: np.ndarray[Any, np.dtype[np.int64]]
    memory: tuple[int, ...]  # bytes of each tensor that it made
    output: int  # address


class Recording:
    """The native calls of `step(rows, groups)`, for any number of either.

    A replay writes to the memory of the one before, its result included.
    """

    def __init__(self, step: Step, max_rows: int) -> None:
        """Runs `step` several times, on as few rows as tell enough; what it reads must stay where it is.

        Its result is [rows, ...], and so are the tensors that it makes, or they do not depend on its sizes. Nor may
        what it calls: a choice between more rows than the samples have would go unseen. Other threads may call
        kernels meanwhile. Raises NotRecordableError, ValueError for `max_rows` below the samples', and what `step`
        raises.
        """
        least = max(rows for rows, _ in _SAMPLES)
        if max_rows < least:
            raise ValueError(f"max_rows is {max_rows}; allowed: at least {least}, on which steps are recorded")
        loaded = native.library()
        assert loaded is not None, "a recording without the library"
        self._replay = loaded.replay
        self._max_rows = max_rows
        self._arena = Arena(max_rows)
        step(*_SAMPLES[0])  # as usual: what is made once, when it is first needed, is there from now on
        self._record(step, *_SAMPLES[0])  # finds out what memory is needed: from now on it is given out alike
        samples = [self._record(step, rows, groups) for rows, groups in _SAMPLES]
        self._num_calls = self._calls
        self._constant, self._by_rows, self._by_groups = _fit(samples)
        self._program = samples[0].program.copy()
        self._address = self._program.ctypes.data
        self._varying = np.flatnonzero(self._by_rows | self._by_groups)
        self._constant, self._by_rows, self._by_groups = (
            part[self._varying] for part in (self._constant, self._by_rows, self._by_groups)
        )

    def replay(self, rows: int, groups: int) -> torch.Tensor:
        """What `step(rows, groups)` does and returns.

        Raises StepFailedError where a call reports a fault, ValueError for more rows than there is memory for.
        """
        if rows > self._max_rows:
            raise ValueError(f"rows is {rows}; allowed: up to {self._max_rows}, for which the step was recorded")
        self._program[self._varying] = self._constant + self._by_rows * rows + self._by_groups * groups
        fault = self._replay(self._address, self._num_calls)
        if fault >= 0:
            raise StepFailedError(f"call {fault} of {self._num_calls} of a recorded step reported a fault")
        return self._output[:rows]

    def _record(self, step: Step, rows: int, groups: int) -> _Sample:
        program: list[bytes] = []
        self._arena.rows, self._arena.sizes = rows, []
        self._output = torch.empty(0)  # the last sample's: its memory is free again
        with _Allocations(self._arena), native.intercept(lambda function: _recorded(function, program)):
            output = step(rows, groups)
        self._calls = len(program)
        self._output = self._arena.whole(output)
        words = np.frombuffer(b"".join(program), np.int64)
        return _Sample((rows, groups), words, tuple(self._arena.sizes), output.data_ptr())


def _fit(samples: list[_Sample]) -> tuple[Words, Words, Words]:
    """Each word of the program as constant + by_rows * rows + by_groups * groups; the later samples prove it."""
    first, more_rows, more_groups = samples[:3]
    for sample in samples[1:]:
        alike = sample.memory == first.memory and sample.output == first.output
        if not alike or len(sample.program) != len(first.program):
            raise NotRecordableError(f"its calls or its memory are others for {sample.sizes} than for {first.sizes}")
    (rows, groups), step_rows = first.sizes, more_rows.sizes[0] - first.sizes[0]
    by_rows = (more_rows.program - first.program) // step_rows
    by_groups = (more_groups.program - more_rows.program) // (more_groups.sizes[1] - groups)
    constant = first.program - by_rows * rows - by_groups * groups
    for sample in samples:
        fitted = constant + by_rows * sample.sizes[0] + by_groups * sample.sizes[1]
        if not np.array_equal(fitted, sample.program):
            raise NotRecordableError(f"an argument is not affine in the sizes {sample.sizes}")
    return constant, by_rows, by_groups


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
