"""A GGUF file as a Hugging Face folder: transformers must get the same model out of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from bench.hf_checkpoint import write_checkpoint
from servd.errors import ConfigError
from servd.hub.files import ModelFiles
from tests.models.test_gguf_weights import build, gguf_of


@pytest.mark.parametrize("quantization", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize(
    ("family", "architecture", "options"),
    [("Llama", "llama", {}), ("Llama", "llama", {"tie_word_embeddings": True}), ("Qwen2", "qwen2", {})],
)
def test_folder_holds_what_transformers_reads_of_the_file(
    family: str, architecture: str, options: dict[str, Any], quantization: str, tmp_path: Path
) -> None:
    model = build(family, **options)
    files = gguf_of(model, tmp_path, architecture=architecture, quantization=quantization)
    expected = load_gguf_checkpoint(files.weights[0], return_tensors=True, model_to_load=model)["tensors"]
    write_checkpoint(files, tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {name: tensor for name, tensor in expected.items() if name in written or name != "lm_head.weight"}
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, torch.as_tensor(expected[name]).to(torch.bfloat16), rtol=0, atol=0)


def test_transformers_loads_the_folder(tmp_path: Path) -> None:
    files = gguf_of(build("Llama"), tmp_path, quantization="Q4_1")
    write_checkpoint(files, tmp_path / "hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16


def test_other_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    files = ModelFiles("other", tmp_path, (tmp_path / "model.safetensors",))
    with pytest.raises(ConfigError, match=r"other holds model\.safetensors; allowed: one \.gguf file"):
        write_checkpoint(files, tmp_path / "hf")
