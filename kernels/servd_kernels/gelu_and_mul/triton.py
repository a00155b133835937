"""Owns the Triton GEGLU gate: which of the shared kernels it is.
Does not know tiles or rounding (activation/triton.py)."""

from collections.abc import Iterator

import torch

from servd_kernels.activation.triton import GELU_FORMS, cases, launch, supports
from servd_kernels.triton_support import CompileCase

__all__ = ["compile_cases", "run", "supports"]


def run(
    x: torch.Tensor, approximate: str = "none", out_dtype: torch.dtype | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return launch(x, GELU_FORMS[approximate], True, out_dtype)


def compile_cases() -> Iterator[CompileCase]:
    return cases({" erf": GELU_FORMS["none"], " tanh": GELU_FORMS["tanh"]}, True)
