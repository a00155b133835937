"""Mistral: Llama with a sliding window on every layer.

Knows only how its config.json differs from other decoders'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from servd.models.base import MODELS
from servd.models.decoder import DecoderConfig, DecoderModel, read_decoder_config, read_int


@MODELS.register("MistralForCausalLM")
class MistralForCausalLM(DecoderModel):
    """`sliding_window` holds for all layers; null means full attention. No biases."""

    gguf_permutes_qk: ClassVar[bool] = True

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        window = 0 if config.get("sliding_window") is None else read_int(config, "sliding_window")
        return read_decoder_config(config, sliding_windows=(window,) * read_int(config, "num_hidden_layers"))
