"""The rotary table against transformers' own frequencies.

Knows nothing of the kernel that applies it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from servd.layers.rotary import RopeConfig, RotaryEmbedding

CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-options": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 32,
        "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 128,
        "attention_factor": 0.9,
    },
}  # fmt: skip
MAX_POSITION, HEAD_DIM = 256, 64


def table(config: dict[str, Any]) -> torch.Tensor:
    rotary = RotaryEmbedding(RopeConfig.from_hf(config, HEAD_DIM, MAX_POSITION), torch.device("cpu"))
    rotary.finish_loading()
    return rotary.cos_sin


def hf_config(parameters: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=MAX_POSITION, rope_parameters=dict(parameters)
    )


@pytest.mark.parametrize("case", CASES)
def test_table_equals_transformers_to_the_bit(case: str) -> None:
    ours = table({"rope_parameters": CASES[case]})
    rotary = LlamaRotaryEmbedding(hf_config(CASES[case]))
    cos, sin = rotary(torch.zeros(1), torch.arange(len(ours))[None])
    assert torch.equal(ours, torch.cat([cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]], dim=1))


@pytest.mark.parametrize("case", [case for case in CASES if case != "default"])
def test_old_config_form_means_the_same(case: str) -> None:
    parameters = dict(CASES[case])
    theta, rope_type = parameters.pop("rope_theta"), parameters.pop("rope_type")
    old = {"rope_theta": theta, "rope_scaling": {"type": rope_type, **parameters}}
    assert torch.equal(table(old), table({"rope_parameters": CASES[case]}))


def test_dynamic_uses_the_base_of_the_longest_sequence_throughout() -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    ours = table({"rope_parameters": parameters})
    assert len(ours) == 2 * MAX_POSITION
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](hf_config(parameters), seq_len=len(ours))
    angles = torch.arange(len(ours), dtype=torch.float32)[:, None] * frequencies
    assert torch.equal(ours, torch.cat([angles.cos(), angles.sin()], dim=1))


@pytest.mark.parametrize(
    ("case", "positions"), [("default", 256), ("llama3", 256), ("linear", 768), ("yarn", 256), ("yarn-options", 256)]
)
def test_table_covers_the_scaled_context(case: str, positions: int) -> None:
    assert table({"rope_parameters": CASES[case]}).shape == (positions, HEAD_DIM)


def test_yarn_beyond_the_configured_length() -> None:
    """Qwen2.5 documents max_position_embeddings = 32768 with factor 4: 131072 positions are meant."""
    parameters = {**CASES["yarn"], "factor": 16.0}
    assert table({"rope_parameters": parameters}).shape == (1024, HEAD_DIM)


def test_partial_rotation_covers_the_leading_dimensions() -> None:
    assert table({"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}).shape == (MAX_POSITION, HEAD_DIM // 2)
