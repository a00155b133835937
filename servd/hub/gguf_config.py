"""GGUF metadata to a config.json in Hugging Face form, for the architectures servd runs.

Knows nothing of tokenizers or of where the result is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from servd.hub.gguf_check import GGUFTensor

# GGUF name → (model_type, architectures[0]); llama.cpp writes Mistral, Llama and SmolLM alike as "llama"
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
FLOAT_TYPES = {"F32": "float32", "F16": "float16"}
# Llama 3.1 to 3.3, all sizes: (low_freq_factor, high_freq_factor, original_max_position_embeddings)
LLAMA3_ROPE = (1.0, 4.0, 8192)


class MetadataError(ValueError):
    """The metadata lacks something or names what servd does not know; the message says what."""


def hf_config(
    metadata: Mapping[str, Any], tensors: Sequence[GGUFTensor], rope_freqs: Sequence[float]
) -> dict[str, Any]:
    """config.json as a dict. `rope_freqs`: values of the tensor rope_freqs.weight, empty if there is none.

    Raises MetadataError.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise MetadataError(f"its architecture is {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    model_type, hf_class = ARCHITECTURES[architecture]
    by_name = {tensor.name: tensor for tensor in tensors}
    if "token_embd.weight" not in by_name:
        raise MetadataError("it has no tensor token_embd.weight")
    vocab_size, embedding_width = by_name["token_embd.weight"].shape[0], by_name["token_embd.weight"].shape[-1]

    field = _Fields(metadata, architecture)
    hidden_size = field.integer("embedding_length")
    if embedding_width != hidden_size:
        raise MetadataError(f"token_embd.weight is {embedding_width} wide, embedding_length says {hidden_size}")
    num_heads = field.integer("attention.head_count")
    head_dim = field.integer("attention.key_length", default=hidden_size // num_heads)
    sliding_window = field.integer("attention.sliding_window", default=0)
    if sliding_window and model_type == "llama":
        model_type, hf_class = "mistral", "MistralForCausalLM"
    rope_theta = field.number("rope.freq_base", default=10000.0)
    config: dict[str, Any] = {
        "architectures": [hf_class],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": field.integer("feed_forward_length"),
        "num_hidden_layers": field.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": field.integer("attention.head_count_kv", default=num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": field.integer("context_length"),
        "rms_norm_eps": field.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(field, rope_freqs, rope_theta, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in by_name,
        "tie_word_embeddings": "output.weight" not in by_name,
        "vocab_size": vocab_size,
        "torch_dtype": _torch_dtype(tensors),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(metadata),
    }
    if sliding_window:
        config["sliding_window"] = sliding_window
    return config


class _Fields:
    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata = metadata
        self.prefix = architecture

    def get(self, name: str) -> Any:
        return self.metadata.get(f"{self.prefix}.{name}")

    def integer(self, name: str, default: int | None = None) -> int:
        """The positive integer `name` (with a default: also 0), the same for all layers."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        least = 1 if default is None else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise MetadataError(f"{self.prefix}.{name} is {_shown(value)}; one integer from {least} is needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The positive finite number `name`."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not (value > 0 and math.isfinite(value)):
            raise MetadataError(f"{self.prefix}.{name} is {_shown(value)}; a positive number is needed")
        return float(value)


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]


def _rope_scaling(
    field: _Fields, rope_freqs: Sequence[float], rope_theta: float, head_dim: int
) -> dict[str, Any] | None:
    if rope_freqs:
        return _rope_scaling_of_factors(rope_freqs, rope_theta, head_dim, field.integer("context_length"))
    kind = field.get("rope.scaling.type")
    if kind in (None, "none"):
        factor = field.number("rope.scale_linear", default=1.0)  # how older files say it
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind == "linear":
        return {"rope_type": "linear", "factor": field.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": field.number("rope.scaling.factor")}
        if field.get("rope.scaling.original_context_length") is not None:
            scaling["original_max_position_embeddings"] = field.integer("rope.scaling.original_context_length")
        for hf_name, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if field.get(f"rope.scaling.{name}") is not None:
                scaling[hf_name] = field.number(f"rope.scaling.{name}")
        return scaling
    raise MetadataError(f"{field.prefix}.rope.scaling.type is {kind!r}; allowed: none, linear, yarn")


def _rope_scaling_of_factors(
    rope_freqs: Sequence[float], rope_theta: float, head_dim: int, context_length: int
) -> dict[str, Any]:
    """Llama 3's rule where it explains the divisors that the converter stored, else the divisors themselves."""
    if len(rope_freqs) != head_dim // 2 or not all(f > 0 and math.isfinite(f) for f in rope_freqs):
        raise MetadataError(f"rope_freqs.weight must hold {head_dim // 2} positive numbers")
    low, high, original = LLAMA3_ROPE
    factor = max(rope_freqs)
    expected = [llama3_divisor(i, rope_theta, head_dim, factor) for i in range(head_dim // 2)]
    if all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(rope_freqs, expected, strict=True)):
        return {
            "rope_type": "llama3",
            "factor": round(factor, 4),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    return {
        "rope_type": "longrope",
        "short_factor": list(rope_freqs),
        "long_factor": list(rope_freqs),
        "attention_factor": 1.0,
        "original_max_position_embeddings": context_length,
    }


def llama3_divisor(index: int, rope_theta: float, head_dim: int, factor: float) -> float:
    """By how much Llama 3's rule slows down the rotary frequency `index`."""
    low, high, original = LLAMA3_ROPE
    wavelength: float = 2 * math.pi * rope_theta ** (2 * index / head_dim)
    if wavelength < original / high:
        return 1.0
    if wavelength > original / low:
        return factor
    smooth = (original / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


def _torch_dtype(tensors: Sequence[GGUFTensor]) -> str:
    kinds = {tensor.ggml_type for tensor in tensors if len(tensor.shape) > 1}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= set(FLOAT_TYPES) else "bfloat16"


def _eos_token_ids(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """All ids that end a turn: end of text, of turn and of message; and the token that the chat template ends with."""
    ids = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        # Older files name only the end of text, but a chat model ends its turns with these.
        ids += [tokens.index(t) for t in ("<|im_end|>", "<|eot_id|>") if t in template and t in tokens]
    known = list(dict.fromkeys(i for i in ids if isinstance(i, int) and 0 <= i < len(tokens)))
    return known[0] if len(known) == 1 else known or None
