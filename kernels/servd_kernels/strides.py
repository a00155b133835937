"""Owns what the ops share about strides: the check of the last one, rows as two dimensions, outputs without gaps.
Does not know shapes or dtypes: those are each op's own."""

import torch


def check_last_stride(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError, naming the tensor, if neighbours in a last dimension are not neighbours in memory.

    Kernels take the strides of all other dimensions, and would read the wrong elements in silence.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have stride 1 in its last dimension, not {list(tensor.stride())}")


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, of x's shape, dtype and device. torch.empty takes a microsecond longer to read a shape."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def outer_inner(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """x [..., width], or a copy that a kernel can walk, and its rows as [outer, inner] with their strides."""
    shape, strides = x.shape, x.stride()
    if len(shape) == 2 and strides[1] == 1:  # first: most calls, and a decode step makes hundreds
        return x, shape[0], 1, strides[0], 0
    if strides[-1] != 1:
        x = x.contiguous()
    if x.dim() > 3:  # by the shape alone: a residual must be walked as its x is
        x = x.contiguous().view(-1, x.shape[-1])
    if x.dim() == 2:
        return x, x.shape[0], 1, x.stride(0), 0
    if x.dim() == 3:
        return x, x.shape[0], x.shape[1], x.stride(0), x.stride(1)
    return x, 1, 1, 0, 0
