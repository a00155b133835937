"""Owns the check of strides that the ops' public functions share.
Does not know shapes or dtypes: those are each op's own."""

import torch


def check_last_stride(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError, naming the tensor, if neighbours in a last dimension are not neighbours in memory.

    Kernels take the strides of all other dimensions, and would read the wrong elements in silence.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have stride 1 in its last dimension, not {list(tensor.stride())}")
