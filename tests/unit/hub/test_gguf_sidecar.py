"""GGUF metadata as a Hugging Face folder: config, tokenizer, tensor table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer

from servd.errors import ConfigError
from servd.hub import ModelFiles
from servd.hub.gguf_config import llama3_divisor
from servd.hub.gguf_sidecar import gguf_model_files

GGUFMaker = Callable[..., Path]


def config_of(path: Path) -> dict[str, Any]:
    return gguf_model_files(path).config()


def test_starter_config(starter_files: ModelFiles) -> None:
    config = starter_files.config()
    expected = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "rope_scaling": None, "vocab_size": 49152,
        "tie_word_embeddings": True, "attention_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert config["rms_norm_eps"] == pytest.approx(1e-5)


def test_starter_tensor_index_is_the_readers(starter_files: ModelFiles) -> None:
    assert starter_files.tensor_index is not None
    index = json.loads(starter_files.tensor_index.read_text())
    reader = gguf.GGUFReader(starter_files.weights[0])
    assert index == [
        {
            "name": tensor.name,
            "ggml_type": tensor.tensor_type.name,
            "shape": tensor.shape.tolist()[::-1],
            "offset": tensor.data_offset,
            "nbytes": tensor.n_bytes,
        }
        for tensor in reader.tensors
    ]


def test_sidecar_is_made_once_and_anew_when_the_file_changes(make_gguf: GGUFMaker, home: Path) -> None:
    path = make_gguf()
    first = gguf_model_files(path)
    made = (first.folder / "config.json").stat().st_mtime_ns
    assert gguf_model_files(path) == first
    assert (first.folder / "config.json").stat().st_mtime_ns == made
    os.utime(path, ns=(1, 1))
    assert gguf_model_files(path).folder != first.folder
    assert sorted(p.name for p in first.folder.iterdir()) == [
        "config.json", "tensors.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert not list((home / "gguf").glob(".new-*"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "tensors.json"])
def test_a_sidecar_that_lost_a_file_is_made_anew(make_gguf: GGUFMaker, home: Path, name: str) -> None:
    path = make_gguf()
    files = gguf_model_files(path)
    before = {p.name: p.read_text() for p in files.folder.iterdir()}
    (files.folder / name).unlink()
    assert gguf_model_files(path) == files
    assert {p.name: p.read_text() for p in files.folder.iterdir()} == before


def test_a_home_that_cannot_hold_the_sidecar_is_named_and_not_the_model(make_gguf: GGUFMaker, home: Path) -> None:
    path = make_gguf()
    home.write_text("in the way")
    with pytest.raises(ConfigError, match=f"^{home}/gguf cannot hold .*{path.name}: .*; set SERVD_HOME"):
        gguf_model_files(path)


@pytest.mark.parametrize(
    ("architecture", "hf_class"),
    [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM"), ("llama", "LlamaForCausalLM")],
)
def test_architectures(make_gguf: GGUFMaker, home: Path, architecture: str, hf_class: str) -> None:
    config = config_of(
        make_gguf(
            architecture,
            extra=lambda w: w.add_key_length(16),
            tensors={"output.weight": np.zeros((16, 32), np.float16), "blk.0.attn_q.bias": np.zeros(64, np.float32)},
        )
    )
    assert (config["model_type"], config["architectures"]) == (architecture, [hf_class])
    assert (config["head_dim"], config["vocab_size"], config["tie_word_embeddings"]) == (16, 16, False)
    assert (config["attention_bias"], config["torch_dtype"]) == (True, "float16")


def test_sliding_window_makes_a_llama_a_mistral(make_gguf: GGUFMaker, home: Path) -> None:
    config = config_of(make_gguf(extra=lambda w: w.add_sliding_window(32)))
    assert (config["model_type"], config["architectures"], config["sliding_window"]) == (
        "mistral", ["MistralForCausalLM"], 32,
    )  # fmt: skip


def test_rope_scaling_from_metadata(make_gguf: GGUFMaker, home: Path) -> None:
    def yarn(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    def linear(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    assert config_of(make_gguf(name="y.gguf", extra=yarn))["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    assert config_of(make_gguf(name="l.gguf", extra=linear))["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_rope_divisors_become_llama3_or_stay_as_they_are(make_gguf: GGUFMaker, home: Path) -> None:
    divisors = np.array([llama3_divisor(i, 500000.0, 8, 8.0) for i in range(4)], np.float32)
    assert divisors[0] == 1.0
    assert divisors[-1] == 8.0
    scaling = config_of(make_gguf(name="3.gguf", tensors={"rope_freqs.weight": divisors}))["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    other = np.array([1.0, 1.5, 2.0, 8.0], np.float32)
    scaling = config_of(make_gguf(name="o.gguf", tensors={"rope_freqs.weight": other}))["rope_scaling"]
    assert (scaling["rope_type"], scaling["attention_factor"]) == ("longrope", 1.0)
    assert scaling["long_factor"] == scaling["short_factor"] == other.tolist()


def test_eos_ids_are_all_that_end_a_turn(make_gguf: GGUFMaker, home: Path) -> None:
    def end_of_text(writer: GGUFWriter) -> None:
        writer.add_uint32("tokenizer.ggml.eot_token_id", 0)

    # <|im_end|> (2) is the file's eos; 0 is added by eot
    assert config_of(make_gguf(extra=end_of_text))["eos_token_id"] == [2, 0]


def sentencepiece(writer: GGUFWriter) -> None:
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], "▁", "a", "b", "▁a", "ab", "▁ab"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 6)
    writer.add_token_scores([0.0] * 259 + [-10.0, -11.0, -12.0, -2.0, -1.0, -3.0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def test_sentencepiece_merges_come_from_the_scores(make_gguf: GGUFMaker, home: Path) -> None:
    files = gguf_model_files(make_gguf(vocabulary=sentencepiece, vocab_size=265))
    tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
    # "ab" (-1) beats "▁a" (-2), then "▁" + "ab" joins
    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]
    assert tokenizer.encode("a é").tokens == ["<s>", "▁a", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("</s>a", add_special_tokens=False).ids[0] == 2
    assert tokenizer.decode(tokenizer.encode("ab é").ids) == "ab é"
    assert files.optional_json("tokenizer_config.json")["add_bos_token"] is True


def test_llama3_vocabulary_takes_known_pieces_whole_and_begins_with_bos(make_gguf: GGUFMaker, home: Path) -> None:
    def llama3(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(["<|begin|>", "a", "b", "c", "abc", "1", "2", "12"])
        writer.add_token_types([3] + [1] * 7)
        writer.add_token_merges(["1 2"])
        writer.add_bos_token_id(0)

    files = gguf_model_files(make_gguf(vocabulary=llama3, vocab_size=8))
    tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
    assert tokenizer.encode("abc").ids == [0, 4]  # no merges lead to "abc"
    assert tokenizer.encode("1212", add_special_tokens=False).tokens == ["12", "1", "2"]  # digits in threes


def test_user_defined_tokens_stay_whole_and_are_not_special(make_gguf: GGUFMaker, home: Path) -> None:
    def with_think(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["<|end|>", "<think>", "a", "aa"])
        writer.add_token_types([3, 4, 1, 1])
        writer.add_token_merges(["a a"])

    files = gguf_model_files(make_gguf(vocabulary=with_think, vocab_size=4))
    tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
    assert tokenizer.encode("a<think>a").ids == [2, 1, 2]
    assert tokenizer.decode([0, 1]) == "<think>"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"architecture": "mamba"}, "architecture is 'mamba'; known: llama, qwen2, qwen3"),
        ({"extra": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)}, "type is 'longrope'"),
        ({"extra": lambda w: w.add_uint16("split.count", 3)}, "split model"),
        ({"vocabulary": lambda w: None}, "tokenizer.ggml.tokens is missing"),
        ({"vocabulary": lambda w: (w.add_token_list(["a"]), w.add_tokenizer_model("bert"))}, "allowed: gpt2, llama"),
        ({"vocabulary": lambda w: (w.add_token_list(["a"]), w.add_tokenizer_model("llama"))}, "scores is missing"),
    ],
)
def test_what_servd_does_not_know_is_named(
    make_gguf: GGUFMaker, home: Path, options: dict[str, Any], reason: str
) -> None:
    path = make_gguf(**options)
    with pytest.raises(ConfigError) as raised:
        gguf_model_files(path)
    assert str(path) in raised.value.message
    assert reason in raised.value.message
    assert not list(home.glob("gguf/*"))
