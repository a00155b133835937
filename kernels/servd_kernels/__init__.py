"""Owns servd's numerical kernels: one folder for each op, found and bound through `Op`.
Does not know servd: it depends on torch alone, and not even on that before an op is bound."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from servd_kernels.registry import Op, op_names

__all__ = ["Op", "op_names", "set_num_threads"]


def set_num_threads(threads: int) -> None:
    """Sets how many threads the native CPU kernels use, the caller included. Results do not depend on it."""
    from servd_kernels import native

    native.set_num_threads(threads)


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562): the build backend reaches build.py through this package where torch is missing.
    if name in ("Op", "op_names"):
        return getattr(importlib.import_module("servd_kernels.registry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
