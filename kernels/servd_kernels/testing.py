"""Owns the one table of tolerances, by class of op and dtype, and the comparison that uses it.
Does not know any op."""

import torch

# (relative, absolute), against a float64 computation from the same rounded inputs. About two units in the last
# place of the dtype for what rounds once; float32 sums grow with the square root of their length.
_LAST_PLACE = {torch.float32: 2.4e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}
_FACTORS = {
    "elementwise": (2.0, 2.0),
    "norm": (4.0, 4.0),
    "attention": (8.0, 4.0),
    "gemm": (8.0, 8.0),
}


def tolerance(kind: str, dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute) for a class of op; "movement" allows nothing."""
    if kind == "movement":
        return 0.0, 0.0
    relative, absolute = _FACTORS[kind]
    unit = _LAST_PLACE[dtype]
    return relative * unit, absolute * unit


def assert_close(actual: torch.Tensor, expected: torch.Tensor, kind: str, scale: float = 1.0) -> None:
    """Compares with the tolerance of `kind` and of actual's dtype; `scale` is the size of the terms summed."""
    relative, absolute = tolerance(kind, actual.dtype)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=absolute * scale, equal_nan=True)
