"""A random Llama checkpoint of a few hundred kilobytes, written without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from servd.hub import ModelFiles

VOCAB_SIZE = 300
MAX_POSITIONS = 128
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_tiny_llama(folder: Path) -> ModelFiles:
    """Weights large enough that the tokens of two prompts differ at once."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    kv_size = HIDDEN // HEADS * KV_HEADS
    tensors = {
        "model.embed_tokens.weight": weight(VOCAB_SIZE, HIDDEN) * 5,
        "model.norm.weight": 1 + weight(HIDDEN),
        "lm_head.weight": weight(VOCAB_SIZE, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": 1 + weight(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": 1 + weight(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": weight(HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": weight(kv_size, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": weight(kv_size, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": weight(HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": weight(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": weight(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": weight(HIDDEN, INTERMEDIATE),
        }
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return ModelFiles("tiny-llama", folder, (folder / "model.safetensors",))
