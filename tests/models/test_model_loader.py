"""Checkpoints that do not fit: each is refused with a message that names what is wrong. And dtype, progress.

Knows nothing of logits.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from servd.errors import ConfigError
from servd.hub.files import ModelFiles
from servd.models.base import MODELS
from servd.models.loader import load_model
from tests.models.model_helpers import (
    DIMENSIONS,
    assert_close,
    hf_files,
    prompts,
    randomize,
    reference_logits,
    run_mixed,
    save,
)

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    """A tiny Llama, untied, saved in bfloat16."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DIMENSIONS))
    randomize(model)
    return save(model.to(torch.bfloat16), tmp_path / "model")


def edit_tensors(files: ModelFiles, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(files.weights[0])
    edit(tensors)
    save_file(tensors, files.weights[0], metadata={"format": "pt"})


def edit_config(files: ModelFiles, **changes: Any) -> None:
    path = files.folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refused(files: ModelFiles, dtype: str = "float32") -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(files, dtype=dtype, device="cpu")
    return caught.value.message


def test_missing_tensors_are_named(files: ModelFiles) -> None:
    edit_tensors(files, lambda tensors: tensors.pop(Q_PROJ))
    assert refused(files) == f"the checkpoint lacks tensor {Q_PROJ}"


def test_untied_model_needs_its_head(files: ModelFiles) -> None:
    edit_tensors(files, lambda tensors: tensors.pop("lm_head.weight"))
    assert refused(files) == "the checkpoint lacks tensor lm_head.weight"


def test_unknown_tensors_are_named_and_counted(files: ModelFiles) -> None:
    extra = {f"model.layers.0.extra{index}.weight": torch.zeros(2) for index in range(8)}
    edit_tensors(files, lambda tensors: tensors.update(extra))
    message = refused(files)
    assert "model.layers.0.extra4.weight and 3 more" in message and "no place for tensors" in message


def test_wrong_shape_names_tensor_and_both_shapes(files: ModelFiles) -> None:
    edit_tensors(files, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 60)}))
    assert refused(files) == f"tensor {Q_PROJ} has shape [64, 60]; config.json asks for [64, 64]"


def test_transposed_norm_of_right_size_is_refused(files: ModelFiles) -> None:
    edit_tensors(files, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(1, 64)}))
    assert "tensor model.norm.weight has shape [1, 64]; config.json asks for [64]" in refused(files)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_need_scales_are_refused(files: ModelFiles, dtype: torch.dtype) -> None:
    edit_tensors(files, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    message = refused(files)
    assert message.startswith(f"tensor {Q_PROJ} has dtype") and "BF16" in message


def test_a_quantized_checkpoint_of_the_hub_says_what_to_take_instead(files: ModelFiles) -> None:
    """Whatever its method is called: names of ours are not names of the hub's."""
    for name in ("awq", "int8", "none"):
        edit_config(files, quantization_config={"quant_method": name, "bits": 4})
        message = refused(files)
        assert f"quantization_config in config.json names quant_method '{name}'; allowed: " in message
        assert "bfloat16" in message and ".gguf" in message


def test_damaged_header_names_the_file(files: ModelFiles) -> None:
    files.weights[0].write_bytes(files.weights[0].read_bytes()[:1000])
    assert str(files.weights[0]) in refused(files)


def test_file_cut_short_names_the_file(files: ModelFiles) -> None:
    files.weights[0].write_bytes(files.weights[0].read_bytes()[:-10])
    assert str(files.weights[0]) in refused(files)


def test_tensor_in_two_shards_is_refused(files: ModelFiles) -> None:
    second = files.folder / "second.safetensors"
    save_file({Q_PROJ: torch.zeros(64, 64)}, second)
    message = refused(dataclasses.replace(files, weights=(*files.weights, second)))
    assert Q_PROJ in message and str(second) in message


def test_pickle_is_refused_unopened(files: ModelFiles, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return (Path.write_text, (tmp_path / "exploded", ""))  # type: ignore[return-value]

    path = files.folder / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Bomb()))
    message = refused(dataclasses.replace(files, weights=(path,)))
    assert "pytorch_model.bin" in message and "pickle" in message
    assert not (tmp_path / "exploded").exists()


def test_code_beside_the_weights_is_never_run(files: ModelFiles, tmp_path: Path) -> None:
    """`auto_map` is how a checkpoint asks for its own modules to be imported (fault 27)."""
    canary = tmp_path / "imported"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (files.folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil",
                "AutoTokenizer": ["tokenization_evil.Evil", None]}  # fmt: skip
    edit_config(files, auto_map=auto_map, trust_remote_code=True)
    (files.folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": auto_map, "tokenizer_class": "tokenization_evil.Evil", "trust_remote_code": True})
    )
    load_model(files, dtype="float32", device="cpu")
    assert not canary.exists()
    edit_config(files, architectures=["modeling_evil.Evil"])
    assert "modeling_evil.Evil" in refused(files)
    assert not canary.exists()


def test_unknown_architecture_names_the_known_ones(files: ModelFiles) -> None:
    edit_config(files, architectures=["MambaForCausalLM"])
    assert refused(files) == (
        "unknown model architecture 'MambaForCausalLM'; "
        "known: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    )


@pytest.mark.parametrize("architectures", [..., None, [], [3], "LlamaForCausalLM"])
def test_malformed_architectures_are_refused(files: ModelFiles, architectures: Any) -> None:
    edit_config(files, architectures=architectures)
    message = refused(files)
    assert message.startswith("architectures in config.json is") and "LlamaForCausalLM" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": ...}, "hidden_size in config.json is None; allowed: a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json is 0; allowed: a positive integer"),
        ({"vocab_size": "96"}, "vocab_size in config.json is '96'; allowed: a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; allowed: a divisor of the 4 query heads"),
        (
            {"hidden_act": "relu"},
            "hidden_act is 'relu'; allowed: silu, swish, gelu, gelu_pytorch_tanh, gelu_new, gelu_fast",
        ),
        ({"rms_norm_eps": "small"}, "rms_norm_eps in config.json is 'small'; allowed: a positive number"),
        (
            {"rope_parameters": {"rope_type": "spiral"}},
            "rope_type is 'spiral'; allowed: default, dynamic, linear, llama3, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "factor of rope_type 'linear' is None; allowed: a positive number",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": "big"}},
            "factor of rope_type 'yarn' is 'big'; allowed: a positive number",
        ),
        (
            {"rope_parameters": {"rope_theta": float("inf")}},
            "rope_theta of rope_type 'default' is inf; allowed: a positive number",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.3125}},
            "5 dimensions of a head are rotated; allowed: even, at most 16",
        ),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn'; allowed: an object"),
    ],
)
def test_config_that_cannot_be_honoured_names_the_field(
    files: ModelFiles, changes: dict[str, Any], expected: str
) -> None:
    edit_config(files, **changes)
    assert refused(files) == expected


@pytest.mark.parametrize(
    ("changes", "asked", "expected"),
    [
        ({}, "auto", torch.bfloat16),
        ({"dtype": ..., "torch_dtype": "float16"}, "auto", torch.float16),
        ({"dtype": ...}, "auto", torch.bfloat16),  # not named: what the tensors are
        ({}, "float16", torch.float16),
    ],
)
def test_dtype(files: ModelFiles, changes: dict[str, Any], asked: str, expected: torch.dtype) -> None:
    edit_config(files, **changes)
    assert load_model(files, dtype=asked, device="cpu").dtype == expected


@pytest.mark.parametrize(("changes", "asked"), [({"dtype": "float64"}, "auto"), ({}, "int8")])
def test_dtype_that_is_not_served_is_refused(files: ModelFiles, changes: dict[str, Any], asked: str) -> None:
    edit_config(files, **changes)
    assert refused(files, asked).endswith("allowed: auto, float32, bfloat16, float16")


def test_progress_counts_every_tensor(files: ModelFiles) -> None:
    seen: list[tuple[str, int, int]] = []
    load_model(files, dtype="float32", device="cpu", progress=lambda *step: seen.append(step))
    total = len(load_file(files.weights[0]))
    assert seen == [("loading weights", done, total) for done in range(1, total + 1)]


def test_tied_model_ignores_a_second_copy_and_old_rotary_buffers(tmp_path: Path) -> None:
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DIMENSIONS, tie_word_embeddings=True))
    randomize(theirs)
    files = save(theirs, tmp_path)
    expected = run_mixed(load_model(files, dtype="float32", device="cpu"), prompts())
    extra = {"lm_head.weight": torch.zeros(96, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    edit_tensors(files, lambda tensors: tensors.update(extra))
    assert_close(run_mixed(load_model(files, dtype="float32", device="cpu"), prompts()), expected, tolerance=0)


def test_model_tells_its_dimensions(files: ModelFiles) -> None:
    model = load_model(files, dtype="float32", device="cpu")
    assert (model.num_layers, model.num_kv_heads, model.head_dim, model.vocab_size) == (3, 2, 16, 96)
    assert model.max_position_embeddings == 64 and model.device == torch.device("cpu")


@pytest.mark.parametrize("architecture", MODELS.discover())
def test_every_registered_model_loads_a_checkpoint_of_its_own_slots(architecture: str, tmp_path: Path) -> None:
    """The contract of the registry: what weight_slots asks for is enough to run."""
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    theirs = getattr(transformers, architecture)(config_class(**DIMENSIONS))
    files = save(theirs, tmp_path)
    model = load_model(files, dtype="float32", device="cpu")
    assert run_mixed(model, prompts())["b"].shape == (9, 96)
    assert hf_files(tmp_path).config()["architectures"] == [architecture]


@pytest.mark.parametrize("first", [0, 2, 3])
def test_configs_before_layer_types_say_the_same_with_max_window_layers(first: int, tmp_path: Path) -> None:
    options = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": first}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DIMENSIONS, **options))
    randomize(theirs)
    files = save(theirs, tmp_path)
    edit_config(files, layer_types=...)
    assert_close(
        run_mixed(load_model(files, dtype="float32", device="cpu"), prompts()), reference_logits(theirs, prompts())
    )


@pytest.mark.parametrize(
    "layer_types", ["full_attention", ["full_attention"], [["full_attention"]] * 3, ["linear"] * 3]
)
def test_layer_types_that_are_not_known_are_refused(layer_types: Any, tmp_path: Path) -> None:
    config = transformers.Qwen2Config(**DIMENSIONS, use_sliding_window=True, sliding_window=5)
    files = save(transformers.Qwen2ForCausalLM(config), tmp_path)
    edit_config(files, layer_types=layer_types)
    assert refused(files) == (
        f"layer_types is {layer_types!r}; allowed: one of sliding_attention, full_attention for each layer"
    )


def storages_of(numel: int) -> set[int]:
    """Where the memory of all living tensors of at least so many elements begins."""
    gc.collect()
    # By type(): isinstance() asks proxies in torch.distributed for their class, which warns.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel() >= numel}


@pytest.mark.parametrize(("is_tied", "copies"), [(True, 1), (False, 2)])
def test_a_tied_embedding_is_held_once(is_tied: bool, copies: int, tmp_path: Path) -> None:
    options = {**DIMENSIONS, "vocab_size": 2000, "tie_word_embeddings": is_tied}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    files = save(theirs, tmp_path)
    before = storages_of(2000 * 64)
    model = load_model(files, dtype="float32", device="cpu")
    assert len(storages_of(2000 * 64) - before) == copies
    assert_close(run_mixed(model, prompts()), reference_logits(theirs, prompts()))
