"""GGUF checkpoints: names, the reordering of q and k, every type, and files that do not fit.

Knows nothing of how bytes become floats (test_ggml_types).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from servd.config import QUANTIZATIONS
from servd.distributed.group import TPGroup
from servd.errors import ConfigError
from servd.hub.files import ModelFiles
from servd.models.gguf import huggingface_name
from servd.models.loader import load_model
from tests.models.model_helpers import (
    DIMENSIONS,
    ThreadRanks,
    assert_close,
    gguf_files,
    prompts,
    randomize,
    reference_logits,
    run_mixed,
)

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def ggml_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, index, rest = stem.split(".", 3)
        return f"blk.{index}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def permute(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to q and k of Llama."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    *,
    quantization: str = "F32",
    architecture: str = "llama",
    extra: dict[str, Tensor] | None = None,
    others: dict[str, str] | None = None,
) -> None:
    """As llama.cpp's converter: vectors in F32, matrices in `quantization` or, by the module's name, in `others`."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.split(".")[-2]
        if architecture == "llama" and module in heads:
            tensor = permute(tensor, heads[module])
        values = tensor.contiguous().float().numpy()
        kind = gguf.GGMLQuantizationType[(others or {}).get(module, quantization)]
        if values.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(ggml_name(name), values)
        else:
            writer.add_tensor(ggml_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build(family: str, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**DIMENSIONS, "intermediate_size": 96, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomize(model)
    return model


def gguf_of(model: Any, folder: Path, **options: Any) -> ModelFiles:
    path = folder / "model.gguf"
    write_gguf(path, model, **options)
    return gguf_files(path, model.config.to_dict() | {"architectures": [type(model).__name__]})


@pytest.mark.parametrize(
    ("family", "architecture", "options"),
    [
        ("Llama", "llama", {}),
        ("Llama", "llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("Mistral", "llama", {"sliding_window": 6}),
        ("Qwen2", "qwen2", {}),
        ("Qwen3", "qwen3", {"head_dim": 16}),
    ],
)
def test_float_gguf_gives_the_logits_of_the_original(
    family: str, architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = build(family, attn_implementation="eager", **options)
    ours = load_model(gguf_of(theirs, tmp_path, architecture=architecture), dtype="auto", device="cpu")
    assert ours.dtype == torch.float32
    assert_close(run_mixed(ours, prompts()), reference_logits(theirs, prompts()))


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_type_gives_the_logits_that_transformers_has_of_the_same_file(quantization: str, tmp_path: Path) -> None:
    """transformers reads the GGUF itself, and undoes the reordering in its own code."""
    theirs = build("Llama")
    files = gguf_of(theirs, tmp_path, quantization=quantization)
    parsed = load_gguf_checkpoint(files.weights[0], return_tensors=True, model_to_load=theirs)
    theirs.load_state_dict(parsed["tensors"], strict=True)
    ours = load_model(files, dtype="float32", device="cpu")
    assert_close(run_mixed(ours, prompts()), reference_logits(theirs, prompts()))


@pytest.mark.parametrize(
    ("quantization", "others"),
    [
        ("Q8_0", {}),
        ("Q4_0", {}),
        ("Q4_1", {"embed_tokens": "Q8_0", "lm_head": "Q8_0"}),
        ("Q4_0", {"v_proj": "Q8_0", "up_proj": "Q4_1", "lm_head": "F16"}),
        ("Q4_1", {"k_proj": "F32", "down_proj": "F16", "gate_proj": "BF16"}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_stored_codes_give_the_logits_of_the_same_file_dequantized(
    quantization: str, others: dict[str, str], tied: bool, tmp_path: Path
) -> None:
    """Also where the parts of a fused layer are of different types; activations of 8 bits lose a little."""
    files = gguf_of(build("Llama", tie_word_embeddings=tied), tmp_path, quantization=quantization, others=others)
    exact = run_mixed(load_model(files, dtype="float32", device="cpu", quantization="none"), prompts())
    stored = run_mixed(load_model(files, dtype="float32", device="cpu", quantization="stored"), prompts())
    for name, expected in exact.items():
        error = (stored[name] - expected).std() / expected.std()
        assert 0 < error < 0.05


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_ranks_share_the_codes_of_a_file(quantization: str, tmp_path: Path) -> None:
    """Of 4 ranks, the last has fewer rows of the vocabulary; each KV head is held twice."""
    theirs = build("Llama", tie_word_embeddings=True, intermediate_size=128, hidden_size=128, vocab_size=97)
    files = gguf_of(theirs, tmp_path, quantization="Q4_1", others={"v_proj": "Q8_0"})

    def work(group: TPGroup) -> Tensor:
        model = load_model(files, dtype="float32", device="cpu", quantization=quantization, group=group)
        return run_mixed(model, prompts())["a"]

    (alone,) = ThreadRanks(1).run(work)
    for logits in ThreadRanks(4).run(work):
        assert logits.shape == (23, 97)
        assert (logits - alone).std() < 0.1 * alone.std()


def test_ranks_that_would_cut_a_group_are_told_the_tensor(tmp_path: Path) -> None:
    files = gguf_of(build("Llama"), tmp_path, quantization="Q4_0")  # 96 columns in groups of 32
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj\.weight: columns 0 to 48 of 96 .* groups of 32"):
        load_model(files, dtype="bfloat16", device="cpu", group=TPGroup(0, 2, torch.clone, torch.clone))


def test_auto_takes_codes_where_the_file_has_them_unless_all_is_to_be_exact(tmp_path: Path) -> None:
    files = gguf_of(build("Llama"), tmp_path, quantization="Q4_1")

    def logits(dtype: str, quantization: str, files: ModelFiles = files) -> Tensor:
        return run_mixed(load_model(files, dtype=dtype, device="cpu", quantization=quantization), prompts())["a"]

    assert torch.equal(logits("auto", "auto"), logits("bfloat16", "stored"))
    assert not torch.equal(logits("bfloat16", "auto"), logits("bfloat16", "none"))
    assert torch.equal(logits("float32", "auto"), logits("float32", "none"))
    recommended = dataclasses.replace(files, recommended_quantization="w8a8")
    assert torch.equal(logits("auto", "auto", recommended), logits("bfloat16", "w8a8"))
    assert torch.equal(logits("float32", "auto", recommended), logits("float32", "none"))


def test_a_file_of_plain_floats_is_no_quantized_one(tmp_path: Path) -> None:
    files = gguf_of(build("Llama"), tmp_path, quantization="BF16")
    auto, plain = (
        run_mixed(load_model(files, dtype="bfloat16", device="cpu", quantization=name), prompts())["a"]
        for name in ("auto", "none")
    )
    assert torch.equal(auto, plain)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q4_1", torch.bfloat16)],
)
def test_auto_dtype_follows_the_matrices(quantization: str, expected: torch.dtype, tmp_path: Path) -> None:
    files = gguf_of(build("Llama"), tmp_path, quantization=quantization)
    assert load_model(files, dtype="auto", device="cpu").dtype == expected


def test_rope_freqs_tensor_is_llama3_scaling(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    theirs = build("Llama", rope_parameters=rope)
    plain = 1.0 / (10_000.0 ** (torch.arange(0, 16, 2).float() / 16))
    factors = plain / theirs.model.rotary_emb.inv_freq
    assert factors.max() > 2

    path = tmp_path / "model.gguf"
    write_gguf(path, theirs, extra={"rope_freqs.weight": factors})
    config = theirs.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "rope_parameters": None}
    ours = load_model(gguf_files(path, config), dtype="float32", device="cpu")
    assert_close(run_mixed(ours, prompts()), reference_logits(theirs, prompts()))


def edit_index(files: ModelFiles, ggml_name: str, **changes: Any) -> None:
    assert files.tensor_index is not None
    rows = json.loads(files.tensor_index.read_text())
    for row in rows:
        if row["name"] == ggml_name:
            row.update(changes)
    files.tensor_index.write_text(json.dumps(rows))


def refused(files: ModelFiles) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(files, dtype="float32", device="cpu")
    return caught.value.message


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    return gguf_of(build("Llama"), tmp_path)


def test_unsupported_type_names_tensor_type_and_the_supported_ones(files: ModelFiles) -> None:
    edit_index(files, "blk.0.attn_v.weight", ggml_type="Q3_K")
    message = refused(files)
    assert "tensor blk.0.attn_v.weight of" in message and "ggml type is Q3_K; allowed: F32, F16," in message


def test_tensor_beyond_the_end_of_the_file_is_refused(files: ModelFiles) -> None:
    edit_index(files, "output.weight", offset=files.weights[0].stat().st_size - 100)
    assert "tensor output.weight of" in refused(files)


def test_missing_tensors_are_named(files: ModelFiles) -> None:
    edit_index(files, "blk.2.ffn_up.weight", name="blk.2.ffn_up_exps.weight")
    assert refused(files) == "the checkpoint lacks tensor model.layers.2.mlp.up_proj.weight"
    edit_index(files, "blk.1.attn_norm.weight", name="blk.1.ssm_a")
    assert "model.layers.1.input_layernorm.weight" in refused(files)


def test_surplus_tensor_is_named_as_in_the_file(files: ModelFiles) -> None:
    assert files.tensor_index is not None
    rows = json.loads(files.tensor_index.read_text())
    files.tensor_index.write_text(json.dumps([*rows, rows[0] | {"name": "blk.1.ssm_a"}]))
    assert refused(files) == "the model has no place for tensor blk.1.ssm_a of the checkpoint"


def test_wrong_shape_of_a_reordered_tensor_is_reported(files: ModelFiles) -> None:
    edit_index(files, "blk.0.attn_q.weight", shape=[512, 8])
    assert "q_proj.weight has shape [512, 8]; config.json asks for [64, 64]" in refused(files)


@pytest.mark.parametrize("text", ["not json", "[{}]", '[{"name": 3}]', "{}x"])
def test_malformed_index_is_refused(files: ModelFiles, text: str) -> None:
    assert files.tensor_index is not None
    files.tensor_index.write_text(text)
    assert "tensor index" in refused(files)


def test_names_without_counterpart_stay_as_they_are() -> None:
    assert huggingface_name("blk.12.attn_k_norm.weight") == "model.layers.12.self_attn.k_norm.weight"
    assert huggingface_name("blk.1.attn_q.bias") == "model.layers.1.self_attn.q_proj.bias"
    assert huggingface_name("blk.1.ffn_gate_inp.weight") == "blk.1.ffn_gate_inp.weight"
    assert huggingface_name("rope_freqs.weight") == "rope_freqs.weight"


def test_the_reordering_is_not_its_own_inverse() -> None:
    """Else the tests above could not tell undoing it from doing it twice."""
    rows = torch.from_numpy(numpy.arange(64)).reshape(64, 1)
    assert not torch.equal(permute(permute(rows, 4), 4), rows)
