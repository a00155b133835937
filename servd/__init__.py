"""servd: a small, fast LLM serving engine. The names here are loaded on first use, so that `import servd` is quick."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from servd.config import EngineConfig as EngineConfig
    from servd.engine.async_engine import AsyncEngine as AsyncEngine
    from servd.engine.llm import LLM as LLM
    from servd.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncEngine", "EngineConfig", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "servd.engine.llm",
    "AsyncEngine": "servd.engine.async_engine",
    "EngineConfig": "servd.config",
    "SamplingParams": "servd.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'servd' has no attribute {name!r}")
