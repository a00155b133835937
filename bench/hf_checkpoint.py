#!/usr/bin/env python3
"""A GGUF model as a Hugging Face folder of bfloat16 safetensors, for engines that read no GGUF.
Decodes with the gguf package, not with servd's loader: the two check each other. Knows nothing of who will load it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from servd.errors import ConfigError
from servd.hub import resolve_model
from servd.hub.files import ModelFiles
from servd.models.gguf import huggingface_name

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
WEIGHTS = "model.safetensors"
# llama.cpp reorders the rows of q and k where the model rotates halves of heads and it rotates neighbours.
PERMUTED = ("LlamaForCausalLM", "MistralForCausalLM")


def write_checkpoint(files: ModelFiles, folder: Path) -> None:
    """Write config, tokenizer and weights to `folder`; every value is rounded once, from float32 to bfloat16.

    The weights get their name last: a folder with model.safetensors is whole. Raises ConfigError if it is no GGUF.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**files.config(), "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name in SIDE_FILES:
        if (files.folder / name).is_file():
            shutil.copyfile(files.folder / name, folder / name)
    partial = folder / f"{WEIGHTS}.partial"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in float_tensors(files)}, partial, {"format": "pt"})
    partial.rename(folder / WEIGHTS)


def float_tensors(files: ModelFiles) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under Hugging Face's name, in float32, in Hugging Face's order of rows."""
    if len(files.weights) != 1 or files.weights[0].suffix != ".gguf":
        raise ConfigError(f"{files.name} holds {', '.join(p.name for p in files.weights)}; allowed: one .gguf file")
    config = files.config()
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    is_permuted = config["architectures"][0] in PERMUTED
    for entry in gguf.GGUFReader(files.weights[0]).tensors:
        # Entries list the fastest axis first; torch the slowest.
        values = gguf.dequantize(entry.data, entry.tensor_type).reshape([int(n) for n in reversed(entry.shape)])
        name = huggingface_name(entry.name)
        part = name.split(".")[-2]
        tensor = torch.from_numpy(np.array(values, dtype=np.float32))
        yield name, _unpermute(tensor, heads[part]) if is_permuted and part in heads else tensor


def _unpermute(rows: Tensor, num_heads: int) -> Tensor:
    """Neighbours of a head's rows back to its two halves."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape).contiguous()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="catalogue name or .gguf file")
    parser.add_argument("folder", type=Path, help="the folder to write; made if need be")
    arguments = parser.parse_args()
    try:
        write_checkpoint(resolve_model(arguments.model), arguments.folder)
    except ConfigError as error:
        parser.error(error.message)
    return 0


if __name__ == "__main__":
    sys.exit(main())
