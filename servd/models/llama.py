"""Llama 2 and 3, SmolLM2 and all else that calls itself LlamaForCausalLM.

Knows only how their config.json differs from other decoders'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from servd.models.base import MODELS
from servd.models.decoder import DecoderConfig, DecoderModel, read_decoder_config


@MODELS.register("LlamaForCausalLM")
class LlamaForCausalLM(DecoderModel):
    """`attention_bias` puts a bias on all four projections of attention, `mlp_bias` on those of the feed-forward."""

    gguf_permutes_qk: ClassVar[bool] = True

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        attention_bias = bool(config.get("attention_bias", False))
        return read_decoder_config(
            config,
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
        )
