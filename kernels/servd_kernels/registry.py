"""Owns the choice of a backend for an op: what exists, what can run here, what was asked for.
Does not know any op or backend by name beyond the order of preference: it lists the folders."""

import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

# `library`: a vendor's routine. One whose sums depend on the batch serves only where `deterministic=False` is asked.
PREFERENCE = ("cuda", "library", "triton", "cpu", "reference")
BACKEND_VARIABLE = "SERVD_KERNEL_BACKEND"
_PACKAGE = Path(__file__).parent


def op_names() -> list[str]:
    """The ops: every folder that holds a reference."""
    return sorted(path.parent.name for path in _PACKAGE.glob("*/reference.py"))


class Op:
    """One op and its backends. A layer binds it once, in its constructor.

    A backend is a module of the op's folder, with `run`, which has the signature of the reference's `run`, and
    `supports(device, dtype, **axes)`, which returns a reason why it cannot serve them, or None. A backend
    that needs more than one function (`linear` packs weights) also has `bind(device, dtype, **axes)`,
    whose result is called like `run`.
    """

    def __init__(self, name: str) -> None:
        if name not in op_names():
            raise ValueError(f"unknown op {name!r}; known: {', '.join(op_names())}")
        self.name = name

    def __repr__(self) -> str:
        return f"Op({self.name!r})"

    def backends(self) -> list[str]:
        """The backends that exist for this op, in order of preference, whether or not they run here."""
        return [name for name in PREFERENCE if (_PACKAGE / self.name / f"{name}.py").exists()]

    def reason_against(
        self, backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **axes: object
    ) -> str | None:
        """Why the backend cannot serve this device, dtype and axes; None if it can."""
        if backend not in self.backends():
            return f"{self.name} has no backend of that name"
        try:
            module = self._module(backend)
        except ImportError as error:
            return f"it does not import: {error}"
        reason: str | None = module.supports(device, dtype, **axes)
        return reason

    def bind(
        self,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        **axes: object,
    ) -> Callable[..., Any]:
        """The function of the best backend, or of `backend` (or $SERVD_KERNEL_BACKEND) and no other.

        Raises ValueError, with the reason and the known names, if the one asked for cannot run.
        """
        asked = backend or os.environ.get(BACKEND_VARIABLE)
        reasons: dict[str, str] = {}
        for name in [asked] if asked else self.candidates(device):
            reason = self.reason_against(name, device, dtype, **axes)
            if reason is None:
                reasons.pop("library", None)  # left out by choice: no reason to speak of
                if name == "reference" and reasons:
                    _log_fallback(self.name, "; ".join(f"{k}: {v}" for k, v in reasons.items()))
                return self._function(name, device, dtype, **axes)
            reasons[name] = reason
        raise ValueError(
            f"no backend of {self.name} for device {device!r}, {dtype}, {axes}: "
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            + f"; known: {', '.join(self.backends())}"
        )

    def candidates(self, device: str) -> list[str]:
        """For the automatic choice. On a CPU our own kernels beat the vendor's, and Triton is only interpreted there:
        for tests, when asked by name."""
        if torch.device(device).type != "cpu":
            return self.backends()
        return [name for name in ("cpu", "library", "reference") if name in self.backends()]

    def _module(self, backend: str) -> Any:
        return importlib.import_module(f"servd_kernels.{self.name}.{backend}")

    def _function(self, backend: str, device: str, dtype: torch.dtype, **axes: object) -> Callable[..., Any]:
        module = self._module(backend)
        if hasattr(module, "bind"):
            bound: Callable[..., Any] = module.bind(device, dtype, **axes)
            return bound
        run: Callable[..., Any] = module.run
        return run


_logged_reasons: set[str] = set()


def _log_fallback(op: str, reasons: str) -> None:
    """Say it once a reason: without a compiler it is the same for every op."""
    if reasons not in _logged_reasons:
        _logged_reasons.add(reasons)
        logger.warning("%s runs on its slow reference, as does any op that has this reason (%s)", op, reasons)
