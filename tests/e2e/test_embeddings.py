"""Embeddings of the starter model, as `transformers` computes them from the same weights; the same bits in a crowd."""

from __future__ import annotations

import pytest

from servd import LLM
from servd.engine.tokenizer import Tokenizer
from servd.hub import ModelFiles
from tests.e2e.prompts import PROMPTS

SETTINGS = {"kv_cache_memory": 1 << 28, "max_model_len": 2048, "dtype": "float32"}
CHOSEN = [0, 4, 7, 9]


@pytest.fixture(scope="module")
def llm():
    with LLM(**SETTINGS, max_num_batched_tokens=128) as llm:
        yield llm


@pytest.fixture(scope="module")
def hidden(starter_files: ModelFiles, tokenizer: Tokenizer):
    """[num_tokens, hidden_size] for each chosen prompt."""
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(starter_files.folder)).eval()
    parsed = load_gguf_checkpoint(starter_files.weights[0], return_tensors=True, model_to_load=model)
    model.load_state_dict(parsed["tensors"], strict=False)
    with torch.inference_mode():
        return [model.model(torch.tensor([tokenizer.encode(PROMPTS[i])])).last_hidden_state[0] for i in CHOSEN]


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_vectors_are_those_of_transformers(llm, hidden, pooling):
    import torch

    found = torch.tensor(llm.embed([PROMPTS[i] for i in CHOSEN], pooling=pooling))
    rows = [{"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling] for states in hidden]
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    assert torch.allclose(found, expected, atol=2e-4), (found - expected).abs().max()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_crowd_and_a_warm_cache_change_no_bit(llm, pooling):
    alone = [llm.embed(PROMPTS[i], pooling=pooling)[0] for i in CHOSEN]
    crowd = llm.embed([*PROMPTS[:10], *PROMPTS[:15]], pooling=pooling)
    assert [crowd[i] for i in CHOSEN] == alone == [crowd[10 + i] for i in CHOSEN]


def test_dimensions_cut_and_normalize_again(llm):
    (whole,), (cut,) = llm.embed(PROMPTS[0]), llm.embed(PROMPTS[0], dimensions=64)
    length = sum(value * value for value in whole[:64]) ** 0.5
    assert cut == pytest.approx([value / length for value in whole[:64]], abs=1e-6)
