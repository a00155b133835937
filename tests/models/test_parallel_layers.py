"""What each rank of a tensor-parallel group keeps of a checkpoint's tensors.

Knows nothing of whole models (test_model_logits runs those on ranks).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from servd.distributed.group import TPGroup
from servd.errors import ConfigError
from servd.layers.base import Layer, LayerContext
from servd.layers.embedding import LMHead, VocabEmbedding
from servd.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from servd.quant.base import QUANT_METHODS, Shard
from servd.quant.none import DenseWeights

HIDDEN = 8


def context(rank: int = 0, size: int = 1) -> LayerContext:
    """A rank whose all_reduce and all_gather leave its own part as it is, to be looked at."""
    group = TPGroup(rank, size, lambda tensor: tensor, lambda tensor: tensor)
    return LayerContext(torch.float32, torch.device("cpu"), group, DenseWeights)


def filled(layer: Layer, tensors: dict[str, Tensor]) -> Layer:
    slots = layer.weight_slots()
    assert {name: slot.shape for name, slot in slots.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        slots[name].load(tensor)
    layer.finish_loading()
    return layer


def weights_of(layer: ReplicatedLinear, in_features: int) -> Tensor:
    """The layer's matrix, read through the kernel: it multiplies the identity."""
    return layer(torch.eye(in_features)).T


def numbered(rows: int, columns: int = HIDDEN, base: int = 0) -> Tensor:
    return (torch.arange(rows * columns, dtype=torch.float32) + base).view(rows, columns)


def test_single_group_does_nothing() -> None:
    group, tensor = TPGroup.single(), torch.ones(2)
    assert (group.rank, group.size) == (0, 1)
    assert group.all_reduce(tensor) is tensor and group.all_gather(tensor) is tensor


def test_replicated_is_whole_on_every_rank() -> None:
    weight, bias = numbered(5), torch.arange(5.0)
    for rank in range(2):
        layer = ReplicatedLinear(context(rank, 2), "x", HIDDEN, 5, bias=True)
        filled(layer, {"x.weight": weight, "x.bias": bias})
        assert torch.equal(layer(torch.eye(HIDDEN)), weight.T + bias)


def test_column_parallel_keeps_rows() -> None:
    weight, bias = numbered(6), torch.arange(6.0)
    for rank, kept in enumerate((slice(0, 3), slice(3, 6))):
        layer = ColumnParallelLinear(context(rank, 2), "x", HIDDEN, 6, bias=True)
        filled(layer, {"x.weight": weight, "x.bias": bias})
        assert torch.equal(layer(torch.eye(HIDDEN)), weight[kept].T + bias[kept])


def test_merged_keeps_the_same_share_of_each_part() -> None:
    gate, up = numbered(4), numbered(8, base=1000)
    for rank, (gate_rows, up_rows) in enumerate([(slice(0, 2), slice(0, 4)), (slice(2, 4), slice(4, 8))]):
        layer = MergedColumnParallelLinear(context(rank, 2), ["gate", "up"], HIDDEN, [4, 8], bias=False)
        filled(layer, {"gate.weight": gate, "up.weight": up})
        assert torch.equal(weights_of(layer, HIDDEN), torch.cat([gate[gate_rows], up[up_rows]]))


def test_row_parallel_keeps_columns_and_adds_the_bias_on_one_rank() -> None:
    weight, bias = numbered(3), torch.tensor([1.0, 2.0, 3.0])
    outputs = []
    for rank in range(2):
        layer = RowParallelLinear(context(rank, 2), "x", HIDDEN, 3, bias=True)
        filled(layer, {"x.weight": weight, "x.bias": bias})
        outputs.append(layer(torch.ones(1, HIDDEN // 2)))
    assert torch.equal(outputs[1][0], weight[:, 4:].sum(1))
    assert torch.equal(outputs[0][0] + outputs[1][0], weight.sum(1) + bias)


@pytest.mark.parametrize(
    ("size", "rank", "q_heads", "kv_heads"),
    [(1, 0, [0, 1, 2, 3], [0, 1]), (2, 0, [0, 1], [0]), (2, 1, [2, 3], [1]), (4, 1, [1], [0]), (4, 2, [2], [1])],
)
def test_qkv_keeps_whole_heads(size: int, rank: int, q_heads: list[int], kv_heads: list[int]) -> None:
    head_dim = 2
    q, k, v = numbered(8), numbered(4, base=1000), numbered(4, base=2000)
    layer = QKVParallelLinear(
        context(rank, size), "attn", HIDDEN, num_heads=4, num_kv_heads=2, head_dim=head_dim, bias=False
    )
    filled(layer, {"attn.q_proj.weight": q, "attn.k_proj.weight": k, "attn.v_proj.weight": v})
    heads = [q.view(4, head_dim, HIDDEN)[q_heads]] + [x.view(2, head_dim, HIDDEN)[kv_heads] for x in (k, v)]
    assert torch.equal(weights_of(layer, HIDDEN), torch.cat(heads).view(-1, HIDDEN))
    assert (layer.num_heads, layer.num_kv_heads) == (len(q_heads), len(kv_heads))


def test_heads_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads is 9; allowed: a multiple of the 2"):
        QKVParallelLinear(context(0, 2), "attn", HIDDEN, num_heads=9, num_kv_heads=3, head_dim=2, bias=False)
    with pytest.raises(ConfigError, match="num_key_value_heads is 3; allowed: a multiple or a divisor of the 2"):
        QKVParallelLinear(context(0, 2), "attn", HIDDEN, num_heads=6, num_kv_heads=3, head_dim=2, bias=False)
    with pytest.raises(ConfigError, match="output features of gate is 5"):
        MergedColumnParallelLinear(context(0, 2), ["gate"], HIDDEN, [5], bias=False)
    with pytest.raises(ConfigError, match="input features of down is 5"):
        RowParallelLinear(context(0, 2), "down", 5, HIDDEN, bias=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_embedding_gives_zeros_for_rows_of_other_ranks(rank: int) -> None:
    weight = numbered(5) + 1
    layer = VocabEmbedding(context(rank, 2), "embed", 5, HIDDEN)
    filled(layer, {"embed.weight": weight})
    own = range(3) if rank == 0 else range(3, 5)
    expected = torch.stack([row if index in own else torch.zeros(HIDDEN) for index, row in enumerate(weight)])
    assert torch.equal(layer(torch.arange(5)), expected)


def test_tied_head_uses_the_embedding_and_asks_for_nothing() -> None:
    weight = numbered(5)
    embedding = VocabEmbedding(context(), "embed", 5, HIDDEN)
    head = LMHead(context(), "head", 5, HIDDEN, tied_to=embedding)
    filled(embedding, {"embed.weight": weight})
    assert not any(slot.required for slot in head.weight_slots().values())
    head.finish_loading()
    assert torch.equal(head(torch.eye(HIDDEN)), weight.T)


@pytest.mark.parametrize("name", QUANT_METHODS.discover())
def test_weight_format_contract(name: str) -> None:
    """Every format asks for tensors of a whole matrix and multiplies with what it was given."""
    method = QUANT_METHODS.get(name)(torch.float32, torch.device("cpu"), deterministic=True)
    method.create_weights(16, 32)
    shapes = method.checkpoint_shapes(16, 32)
    assert shapes
    for suffix, shape in shapes.items():
        method.load_shard(suffix, torch.zeros(shape), Shard(slice(0, 16), slice(None), 0))
    method.finish_loading()
    bias = torch.arange(16.0)
    assert torch.equal(method.apply(torch.ones(3, 32), bias), bias.expand(3, 16))
