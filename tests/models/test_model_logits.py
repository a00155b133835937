"""Every family against transformers in float32, over chunked, mixed, paged batches.

Knows nothing of how layers are built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from servd.distributed.group import TPGroup
from servd.models.loader import load_model
from tests.models.model_helpers import (
    DIMENSIONS,
    PagedDriver,
    ThreadRanks,
    assert_close,
    hf_files,
    prompts,
    randomize,
    reference_logits,
    run_mixed,
    save,
)

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha-odd": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}),
    "llama-head-dim": ("Llama", {"head_dim": 32}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn-rope": ("Llama", {"rope_parameters": YARN}),
    "llama-linear-rope": ("Llama", {"rope_parameters": LINEAR}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-tied-bias": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
}


def build(case: str) -> Any:
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**DIMENSIONS, **options}, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = build(case)
    ours = load_model(save(theirs, tmp_path), dtype="float32", device="cpu")
    assert_close(run_mixed(ours, prompts()), reference_logits(theirs, prompts()))


def test_sharded_checkpoint_gives_the_same_bits_as_a_single_file(tmp_path: Path) -> None:
    theirs = build("llama")
    single = load_model(save(theirs, tmp_path / "single"), dtype="float32", device="cpu")
    files = save(theirs, tmp_path / "sharded", max_shard_size="50KB")
    assert len(files.weights) > 2
    sharded = load_model(files, dtype="float32", device="cpu")
    expected, got = run_mixed(single, prompts()), run_mixed(sharded, prompts())
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["mistral-window", "qwen3"])
def test_a_request_has_the_same_bits_alone_whole_and_mixed_in_chunks(case: str, dtype: str, tmp_path: Path) -> None:
    model = load_model(save(build(case), tmp_path), dtype=dtype, device="cpu")
    mixed = run_mixed(model, prompts())
    for name, tokens in prompts().items():
        alone = PagedDriver(model, block_size=16, seed=7).step({name: tokens})[name]
        assert torch.equal(mixed[name], alone), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama-tied", "qwen2", "qwen3"])
def test_half_precision_stays_near_float32(case: str, dtype: str, tmp_path: Path) -> None:
    theirs = build(case)
    files = save(theirs, tmp_path)
    model = load_model(files, dtype=dtype, device="cpu")
    assert model.dtype == getattr(torch, dtype)
    expected = reference_logits(theirs, prompts())
    scale = max(logits.abs().max().item() for logits in expected.values())
    assert_close(run_mixed(model, prompts()), expected, tolerance=0.06 * scale)


@pytest.mark.parametrize(
    ("case", "size"), [("llama-biases", 2), ("qwen3-tied-bias", 2), ("qwen2", 4), ("mistral-window", 4)]
)
def test_tensor_parallel_ranks_compute_what_one_rank_does(case: str, size: int, tmp_path: Path) -> None:
    """With 4 ranks over 2 KV heads, each KV head is held twice."""
    theirs = build(case)
    files = save(theirs, tmp_path)

    def work(group: TPGroup) -> dict[str, Tensor]:
        return run_mixed(load_model(files, dtype="float32", device="cpu", group=group), prompts())

    for result in ThreadRanks(size).run(work):
        assert_close(result, reference_logits(theirs, prompts()))


def test_vocabulary_that_does_not_divide_by_the_ranks(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**DIMENSIONS, "vocab_size": 97}, tie_word_embeddings=True)
    theirs = transformers.LlamaForCausalLM(config).eval()
    randomize(theirs)
    files = save(theirs, tmp_path)

    def work(group: TPGroup) -> dict[str, Tensor]:
        return run_mixed(load_model(files, dtype="float32", device="cpu", group=group), prompts(97))

    for result in ThreadRanks(2).run(work):
        assert result["a"].shape == (23, 97)
        assert_close(result, reference_logits(theirs, prompts(97)))


STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"


@pytest.mark.skipif(not (STORIES / "model.safetensors").exists(), reason="the trained model of ../shared is not here")
def test_trained_model_equals_transformers() -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    ours = load_model(hf_files(STORIES), dtype="auto", device="cpu")
    assert_close(run_mixed(ours, prompts(512)), reference_logits(theirs, prompts(512)))
