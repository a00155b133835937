"""Where a rank computes: the device, the threads, and a model loaded there.

Knows nothing of caches or steps.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from servd_kernels import native

from servd.config import EngineConfig
from servd.errors import ConfigError
from servd.models.base import Model
from servd.models.loader import Progress, load_model

if TYPE_CHECKING:
    from servd.hub.files import ModelFiles  # the control plane's: only its shape is used here


def load_on_device(config: EngineConfig, files: ModelFiles, progress: Progress | None = None) -> Model:
    """The model that `config` names, on its device. Raises ConfigError naming the flag or the file that is wrong."""
    device = choose_device(config.model.device)
    if device.type == "cpu":
        set_threads(config.parallel.threads)
    model = load_model(
        files,
        dtype=config.model.dtype,
        device=str(device),
        quantization=config.model.quantization,
        deterministic=config.model.deterministic,
        progress=progress,
    )
    if device.type == "cpu" and native.library() is not None:
        # Steps compute in the native kernels' threads. A second pool that spins on the same cores between torch's
        # few small operations would only take them away.
        torch.set_num_threads(1)
    return model


def choose_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda) stands for here. Raises ConfigError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch sees no GPU here; allowed: auto, cpu")
    return torch.device(name)


def set_threads(threads: int | None) -> None:
    """Give torch and the native kernels so many threads; None: as many as the cores this process may use."""
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    native.set_num_threads(threads)
