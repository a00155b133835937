"""Owns the low-rank update of rows that use different adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685;
grouped as in Chen et al. 2023, Punica, https://arxiv.org/abs/2310.18547). Does not know which adapter is whose."""

from collections.abc import Sequence

import torch

from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

OP = Op("lora")


def lora(
    y: torch.Tensor,
    x: torch.Tensor,
    adapter_ids: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scalings: torch.Tensor,
    slices: Sequence[int] | None = None,
    backend: str | None = None,
) -> None:
    """y[i] += scalings[n] * (x[i] A_n^T) B_n^T, in place, for n = adapter_ids[i].

    y [num_rows, N] and x [num_rows, K] (rows may be strided) and the contiguous a and b are float32, bfloat16 or
    float16; adapter_ids int32 [num_rows]: rows with an id outside 0..num_adapters - 1 (-1: none) stay as they are.
    b [num_adapters, N, max_rank], ranks int32 and scalings float32 [num_adapters]; columns from an adapter's rank on
    are never read. `slices`: the widths of projections stacked in N (q, k, v; gate, up), each with an A of its own:
    a [num_adapters, len(slices), max_rank, K]; for one projection a may be [num_adapters, max_rank, K]. What is
    shrunk stays in float32, and y rounds once. A row's bits do not depend on the others. Raises ValueError for
    shapes or dtypes that do not fit.
    """
    widths = (y.shape[-1],) if slices is None else tuple(slices)
    if a.dim() == 3:
        a = a.unsqueeze(1)
    _check(y, x, a, b, widths)
    num_adapters, rows = len(a), len(y)
    for name, tensor, dtype, size in (
        ("adapter_ids", adapter_ids, torch.int32, rows),
        ("ranks", ranks, torch.int32, num_adapters),
        ("scalings", scalings, torch.float32, num_adapters),
    ):
        if tensor.shape != (size,) or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} [{size}], not {tensor.dtype} {list(tensor.shape)}")
    check_last_stride(y=y, x=x, adapter_ids=adapter_ids, ranks=ranks, scalings=scalings)
    run = OP.bind(y.device.type, y.dtype, backend, max_rank=a.shape[2])
    run(y, x, adapter_ids, a, b, ranks, scalings, widths)


def _check(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, widths: tuple[int, ...]) -> None:
    if y.dim() != 2 or x.dim() != 2 or len(x) != len(y):
        raise ValueError(f"y must be [num_rows, N] and x [num_rows, K], not {list(y.shape)} and {list(x.shape)}")
    if not widths or min(widths) < 0 or sum(widths) != y.shape[1]:
        raise ValueError(f"slices must be widths that sum to N = {y.shape[1]}, not {list(widths)}")
    if a.dim() != 4 or a.shape[1] != len(widths) or a.shape[3] != x.shape[1]:
        wanted = f"[num_adapters, {len(widths)}, max_rank, {x.shape[1]}]"
        raise ValueError(f"a must be {wanted}, not {list(a.shape)}")
    if b.shape != (len(a), y.shape[1], a.shape[2]):
        raise ValueError(f"b must be {[len(a), y.shape[1], a.shape[2]]}, not {list(b.shape)}")
    for name, tensor in (("x", x), ("a", a), ("b", b)):
        if tensor.dtype != y.dtype:
            raise ValueError(f"{name} must be {y.dtype} like y, not {tensor.dtype}")
    for name, tensor in (("a", a), ("b", b)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {list(tensor.stride())}")
