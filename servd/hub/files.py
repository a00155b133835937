"""What a resolved model is on disk, and where servd keeps its own files.

Knows nothing of how the files came there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servd.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`, bytes; called often and from the calling thread."""


CHOOSE_HOME = "set SERVD_HOME to a folder with room that can be written to"

# What of a generation_config.json counts; as in vLLM, its lengths and seeds do not.
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the parts of one model lie. Every path exists when this is made."""

    name: str  # default name that clients use
    folder: Path  # holds config.json and tokenizer.json in Hugging Face form
    weights: tuple[Path, ...]  # safetensors shards in order, or exactly one .gguf
    tensor_index: Path | None = None  # GGUF only: JSON list of {name, ggml_type, shape, offset, nbytes}
    recommended_sampling: Mapping[str, float] = field(default_factory=dict)  # by the catalogue, for want of a file
    recommended_quantization: str | None = None  # what the catalogue found fastest and faithful

    def config(self) -> dict[str, Any]:
        """The parsed config.json. Raises ConfigError if it is not a JSON object."""
        return read_json_object(self.folder / "config.json")

    def sampling_defaults(self) -> dict[str, float]:
        """How the model's makers would have it sampled: generation_config.json's values, by SamplingParams' names."""
        known = {**self.recommended_sampling, **self.optional_json("generation_config.json")}
        return {name: known[name] for name in SAMPLING_DEFAULTS if known.get(name) is not None}

    def optional_json(self, name: str) -> dict[str, Any]:
        """The parsed file `name` of the folder, {} if there is none. Raises ConfigError if it is malformed."""
        path = self.folder / name
        return read_json_object(path) if path.is_file() else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value


def servd_home() -> Path:
    """servd's folder for models and sidecars: $SERVD_HOME, else ~/.cache/servd. It need not exist yet."""
    return Path(os.environ.get("SERVD_HOME") or "~/.cache/servd").expanduser().absolute()
