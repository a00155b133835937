"""Owns the choice of torch's own look-up where there is no native one: it copies rows, so its bits are the same.
Does not know how it works."""

import torch
from torch.nn import functional


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return functional.embedding(ids, table)
