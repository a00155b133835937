"""Owns the Triton SwiGLU gate: which of the shared kernels it is.
Does not know tiles or rounding (activation/triton.py)."""

from collections.abc import Iterator

import torch

from servd_kernels.activation.triton import SILU, cases, launch, supports
from servd_kernels.triton_support import CompileCase

__all__ = ["compile_cases", "run", "supports"]


def run(x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return launch(x, SILU, True, out_dtype)


def compile_cases() -> Iterator[CompileCase]:
    return cases({"": SILU}, True)
