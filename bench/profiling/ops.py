"""Records every kernel call by op and shape, with the bytes and operations that it cannot do without.

Owns the cost of each op. Does not know models: ops are caught where a layer binds them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from servd_kernels import native
from servd_kernels.registry import Op

from bench.profiling.spans import Cost, Recorder

NATIVE = "native"
DTYPE_UNITS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

ROW_CLASSES = (1, 8, 64, 256, 512)

Describe = Callable[..., tuple[str, Cost]]


def record_natives(recorder: Recorder) -> None:
    """From now on, every call into the library is recorded by its function's name, and the replay of recorded ones."""
    point_at = native.Function.point_at

    @functools.wraps(point_at)
    def recorded_point_at(self: native.Function, loaded: native.Library) -> None:
        point_at(self, loaded)
        self.call = recorder.wrapped(f"{NATIVE} {self.name}", self.call)

    native.Function.point_at = recorded_point_at  # type: ignore[method-assign]
    loaded = native.library()
    if loaded is None:
        return
    for function in loaded.functions:  # that modules made while this one was imported
        function.point_at(loaded)
    loaded.replay = recorder.wrapped(f"{NATIVE} replay", loaded.replay)


def record_ops(recorder: Recorder) -> None:
    """From now on, every op that a layer binds is recorded by its shape. Such steps cannot be replayed."""
    bind: Callable[..., Any] = Op._function

    @functools.wraps(bind)
    def recorded_bind(self: Op, *args: Any, **axes: Any) -> Any:
        return _recorded_op(recorder, self.name, bind(self, *args, **axes))

    Op._function = recorded_bind  # type: ignore[method-assign]


def _recorded_op(recorder: Recorder, op: str, bound: Any) -> Any:
    """`bound` is a function, or a dataclass with one as `run`."""
    if dataclasses.is_dataclass(bound) and not isinstance(bound, type):
        pair: Any = bound
        run = _recorded_op(recorder, op, pair.run)

        def pack(*args: Any, **kwargs: Any) -> Any:
            packed = pair.pack(*args, **kwargs)  # which may be multiplied by its own `run`
            return dataclasses.replace(packed, run=run) if hasattr(packed, "run") else packed

        return dataclasses.replace(pair, run=run, pack=pack)
    describe = _DESCRIBE.get(op, _describe_rows)
    begin, end = recorder.begin, recorder.end

    @functools.wraps(bound)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        label, cost = describe(op, *args, **kwargs)
        parent = begin(label)
        parent.children[label].costs[cost] += 1
        try:
            return bound(*args, **kwargs)
        finally:
            end(parent)

    return recorded


def row_class(rows: int) -> str:
    """About how many rows a call has: steps of mixed prefill and decode have any number."""
    return next((f"≤{most}" if most > 1 else "1" for most in ROW_CLASSES if rows <= most), f">{ROW_CLASSES[-1]}")


def _describe_linear(op: str, x: torch.Tensor, packed: Any, *rest: Any, **named: Any) -> tuple[str, Cost]:
    key = (len(x), id(packed))
    found = _linear_costs.get(key)
    if found is None:
        inputs, outputs = packed.in_features, packed.out_features
        held, operations, unit = weight_cost(packed, DTYPE_UNITS[x.dtype])
        moved = held + len(x) * (inputs + outputs) * x.element_size()
        label = f"{op} {row_class(len(x))} x {inputs} → {outputs}{' gated' if getattr(packed, 'gated', False) else ''}"
        found = _linear_costs[key] = label, (moved, len(x) * operations, unit)
    return found


_linear_costs: dict[tuple[int, int], tuple[str, Cost]] = {}


def weight_cost(packed: Any, unit: str) -> Cost:
    """Bytes of a packed weight, operations for each row that is multiplied by it, and the unit that does them.

    `unit`: that of the activations, which holds unless they are quantized for integer products.
    """
    held = (getattr(packed, field.name) for field in dataclasses.fields(packed))
    moved = sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))
    gate = 2 if getattr(packed, "gated", False) else 1
    is_integer = "linear_w8a8" in type(packed).__module__ or getattr(packed, "activations", None) == "int8"
    return moved, 2 * packed.in_features * packed.out_features * gate, "int8" if is_integer else unit


class _AttentionCost:
    """Sums over a step's requests, once a step: all layers get the same lengths."""

    def __init__(self) -> None:
        self._seq_lens: torch.Tensor | None = None
        self._keys = self._pairs = 0

    def __call__(
        self, op: str, q: torch.Tensor, kv_cache: torch.Tensor, kv_format: Any, cu_seqlens_q: torch.Tensor,
        seq_lens: torch.Tensor, *rest: Any, **named: Any,
    ) -> tuple[str, Cost]:  # fmt: skip
        if seq_lens is not self._seq_lens:
            new = cu_seqlens_q.diff().long()
            self._seq_lens, self._keys = seq_lens, int(seq_lens.sum())
            self._pairs = int((new * seq_lens - new * (new - 1) // 2).sum())  # a token sees those before it
        tokens, heads, head_dim = q.shape
        moved = self._keys * kv_cache.shape[1] // kv_format.block_size + 2 * q.nbytes
        label = f"{op} {row_class(tokens)} x {heads} x {head_dim}"
        return label, (moved, 4 * self._pairs * heads * head_dim, DTYPE_UNITS[q.dtype])


def _describe_rope(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any
) -> tuple[str, Cost]:
    moved = 2 * (q.numel() + k.numel() + v.numel()) * q.element_size()
    return f"{op} {row_class(len(q))} x {q.shape[1]} + {k.shape[1]} heads", (moved, 0, "float32")


def _describe_embedding(op: str, ids: torch.Tensor, table: torch.Tensor, *rest: Any, **named: Any) -> tuple[str, Cost]:
    row_bytes = table.shape[1] * table.element_size()
    return f"{op} {row_class(len(ids))} x {table.shape[1]}", (2 * len(ids) * row_bytes, 0, "float32")


def _describe_rows(op: str, *args: Any, **named: Any) -> tuple[str, Cost]:
    tensors = [x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)]
    if not tensors:
        return op, (0, 0, "float32")
    first = tensors[0]
    shape = " x ".join([row_class(first.shape[0]), *map(str, first.shape[1:])]) if first.dim() else ""
    # Read once; results are at most as large, and half as large where a gate joins two columns: not counted.
    return f"{op} {shape}", (sum(tensor.nbytes for tensor in tensors), 0, "float32")


_DESCRIBE: dict[str, Describe] = {
    "embedding": _describe_embedding,
    "linear": _describe_linear,
    "linear_fp8": _describe_linear,
    "linear_w8a8": _describe_linear,
    "linear_wna16": _describe_linear,
    "paged_attention": _AttentionCost(),
    "rope_and_cache": _describe_rope,
}
