"""Tiny random checkpoints, and a driver that runs Model.forward over a paged cache without an engine.

Knows nothing of schedulers: a test says which tokens each request computes in a step.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import gguf
import torch
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.attention.metadata import AttentionMetadata
from servd.distributed.group import TPGroup
from servd.hub.files import ModelFiles
from servd.models.base import Model

T = TypeVar("T")

DIMENSIONS = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a value that shows if it is misplaced: fresh models have zero biases and unit norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)


def save(model: Any, folder: Path, **options: Any) -> ModelFiles:
    """Save a transformers model in Hugging Face layout."""
    model.save_pretrained(folder, **options)
    return hf_files(folder)


def hf_files(folder: Path) -> ModelFiles:
    return ModelFiles(name="tiny", folder=folder, weights=tuple(sorted(folder.glob("*.safetensors"))))


def gguf_files(path: Path, config: dict[str, Any]) -> ModelFiles:
    """Index a GGUF file with the gguf package's own reader."""
    rows = [
        {
            "name": tensor.name,
            "ggml_type": tensor.tensor_type.name,
            "shape": [int(extent) for extent in reversed(tensor.shape)],
            "offset": int(tensor.data_offset),
            "nbytes": int(tensor.n_bytes),
        }
        for tensor in gguf.GGUFReader(path).tensors
    ]
    index = path.with_suffix(".tensors.json")
    index.write_text(json.dumps(rows))
    (path.parent / "config.json").write_text(json.dumps(config))
    return ModelFiles(name="tiny", folder=path.parent, weights=(path,), tensor_index=index)


@dataclass
class _Request:
    computed: int = 0
    block_ids: list[int] = field(default_factory=list)


class PagedDriver:
    """Packs the chunks of a step as the model runner does: one token axis, scattered blocks, stale slots NaN."""

    def __init__(self, model: Model, *, block_size: int = 4, num_blocks: int = 64, seed: int = 0) -> None:
        self.model = model
        self.block_size = block_size
        formats = model.bind_kv_cache(KVCacheDtype(block_size=block_size))
        self.kv_caches = [kv_format.allocate(num_blocks).fill_(0xFF) for kv_format in formats]
        self._free = list(range(1, num_blocks))
        random.Random(seed).shuffle(self._free)
        self._requests: dict[str, _Request] = {}

    def step(self, chunks: dict[str, list[int]]) -> dict[str, Tensor]:
        """Compute each request's next tokens. Returns logits [tokens of the chunk, vocab_size] by request."""
        input_ids, positions, slots, cu_seqlens_q, seq_lens, tables = [], [], [], [0], [], []
        for name, tokens in chunks.items():
            request = self._requests.setdefault(name, _Request())
            new_positions = range(request.computed, request.computed + len(tokens))
            request.computed += len(tokens)
            while len(request.block_ids) * self.block_size < request.computed:
                request.block_ids.append(self._free.pop())
            input_ids += tokens
            positions += new_positions
            slots += [request.block_ids[p // self.block_size] * self.block_size + p % self.block_size
                      for p in new_positions]  # fmt: skip
            cu_seqlens_q.append(len(input_ids))
            seq_lens.append(request.computed)
            tables.append(request.block_ids)
        width = max(len(table) for table in tables)
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor(cu_seqlens_q, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
        )
        hidden = self.model.forward(torch.tensor(input_ids), torch.tensor(positions), metadata, self.kv_caches)
        logits = self.model.compute_logits(hidden)
        return {name: logits[cu_seqlens_q[i] : cu_seqlens_q[i + 1]] for i, name in enumerate(chunks)}


def prompts(vocab_size: int = DIMENSIONS["vocab_size"]) -> dict[str, list[int]]:
    """Three requests of different lengths."""
    generator = random.Random(1)
    return {name: [generator.randrange(vocab_size) for _ in range(n)] for name, n in (("a", 23), ("b", 9), ("c", 14))}


# Tokens that each request computes in each step: chunked prefills and decodes together, a late arrival.
MIXED_STEPS: list[dict[str, int]] = [
    {"a": 10, "b": 5},
    {"b": 1, "a": 7},
    {"a": 5, "b": 1, "c": 13},
    {"c": 1, "b": 1, "a": 1},
    {"b": 1},
]


def run_mixed(model: Model, requests: dict[str, list[int]]) -> dict[str, Tensor]:
    """Logits of every position, [len(request), vocab_size], computed over MIXED_STEPS."""
    driver = PagedDriver(model)
    parts: dict[str, list[Tensor]] = {name: [] for name in requests}
    done = dict.fromkeys(requests, 0)
    for step in MIXED_STEPS:
        chunks = {name: requests[name][done[name] : done[name] + count] for name, count in step.items()}
        for name, logits in driver.step(chunks).items():
            parts[name].append(logits)
            done[name] += step[name]
    assert done == {name: len(tokens) for name, tokens in requests.items()}, "MIXED_STEPS must cover the requests"
    return {name: torch.cat(logits) for name, logits in parts.items()}


def reference_logits(model: Any, requests: dict[str, list[int]]) -> dict[str, Tensor]:
    """What transformers computes for each request alone, without a cache."""
    with torch.no_grad():
        return {name: model(torch.tensor([tokens])).logits[0].float() for name, tokens in requests.items()}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == torch.float32
        worst = (ours[name] - theirs[name]).abs().max().item()
        assert worst <= tolerance, f"request {name}: logits differ by {worst}"


class ThreadRanks:
    """`size` ranks that run as threads of this process, and their collectives."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=30)
        self._slots: list[Tensor] = [torch.empty(0)] * size
        self.groups = [
            TPGroup(rank, size, self._collective(rank, sum), self._collective(rank, lambda parts: torch.cat(parts, -1)))
            for rank in range(size)
        ]

    def run(self, work: Callable[[TPGroup], T]) -> list[T]:
        """What `work` returns on each rank. Raises what it raised on the first that failed."""
        with ThreadPoolExecutor(len(self.groups)) as pool:
            return list(pool.map(work, self.groups))

    def _collective(self, rank: int, combine: Callable[[list[Tensor]], Any]) -> Callable[[Tensor], Tensor]:
        def run(tensor: Tensor) -> Tensor:
            self._slots[rank] = tensor
            self._barrier.wait()
            result: Tensor = combine(list(self._slots))
            self._barrier.wait()
            return result

        return run
