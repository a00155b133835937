"""Qwen2 and Qwen2.5: biases on q, k and v, and a sliding window on the layers that config.json names.

Knows only how their config.json differs from other decoders'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servd.errors import ConfigError
from servd.models.base import MODELS
from servd.models.decoder import DecoderConfig, DecoderModel, read_decoder_config, read_int


def read_sliding_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """[num_layers] the window of each layer, 0 for full attention. Raises ConfigError."""
    num_layers = read_int(config, "num_hidden_layers")
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return (0,) * num_layers
    window = read_int(config, "sliding_window")
    layer_types = config.get("layer_types")
    if layer_types is None:  # written before transformers 4.53
        first = config.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise ConfigError(f"max_window_layers in config.json is {first!r}; allowed: an integer")
        return tuple(window if index >= first else 0 for index in range(num_layers))
    windows = {"sliding_attention": window, "full_attention": 0}
    is_list = isinstance(layer_types, list) and len(layer_types) == num_layers
    if not is_list or any(layer_type not in list(windows) for layer_type in layer_types):
        raise ConfigError(f"layer_types is {layer_types!r}; allowed: one of {', '.join(windows)} for each layer")
    return tuple(windows[layer_type] for layer_type in layer_types)


@MODELS.register("Qwen2ForCausalLM")
class Qwen2ForCausalLM(DecoderModel):
    """The bias of q, k and v is not named in config.json: it is always there."""

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        return read_decoder_config(config, qkv_bias=True, sliding_windows=read_sliding_windows(config))
