"""Qwen3 (dense): RMS norms over each head of q and k, no biases unless config.json asks for them.

Knows only how its config.json differs from other decoders'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servd.models.base import MODELS
from servd.models.decoder import DecoderConfig, DecoderModel, read_decoder_config
from servd.models.qwen2 import read_sliding_windows


@MODELS.register("Qwen3ForCausalLM")
class Qwen3ForCausalLM(DecoderModel):
    """head_dim is 128 where config.json does not say, whatever hidden_size is."""

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        attention_bias = bool(config.get("attention_bias", False))
        return read_decoder_config(
            config,
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            qk_norm=True,
            head_dim=128,
            sliding_windows=read_sliding_windows(config),
        )
