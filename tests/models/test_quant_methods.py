"""The contract of weight formats, over every member of QUANT_METHODS: errors, shards, batches, sizes they cannot have.

Knows nothing of files (test_gguf_weights) or of whole models.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from servd_kernels import linear_wna16
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor

from servd.config import QUANTIZATIONS
from servd.distributed.group import TPGroup
from servd.errors import ConfigError
from servd.layers.base import Layer, LayerContext
from servd.layers.embedding import LMHead, VocabEmbedding
from servd.layers.linear import (
    ColumnParallelLinear,
    GatedLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from servd.quant.base import QUANT_METHODS, Shard

METHODS = QUANT_METHODS.discover()
IN_FEATURES = 256
# Root mean square of the error, relative to that of the product, when plain weights are given: half a step of the
# codes of weights (4 bits: 1/15 of a group's range; 8 bits: 1/127 of its largest) and of activations.
ERRORS = {"none": 1e-6, "stored": 1e-6, "int8": 0.01, "w8a8": 0.015, "w4a16": 0.1, "w4a8": 0.1}
CODES_ERROR = 0.01  # the same when the weights' own codes are given and taken over: what activations lose


def context(name: str, rank: int = 0, size: int = 1) -> LayerContext:
    """A rank whose collectives leave its own part as it is, to be looked at."""
    group = TPGroup(rank, size, lambda tensor: tensor, lambda tensor: tensor)
    return LayerContext(torch.float32, torch.device("cpu"), group, QUANT_METHODS.get(name))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(layer: Layer, tensors: dict[str, Tensor | GroupedWeight]) -> Layer:
    """The layer with its weights, given as a loader would: the memory of one tensor may be the next one's."""
    slots = layer.weight_slots()
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            lent = tensor.clone()
            slots[name].load(lent)
            lent.fill_(torch.nan)
        else:
            load_codes = slots[name].load_codes
            assert load_codes is not None
            load_codes(tensor)
    layer.finish_loading()
    return layer


def replicated(name: str, weight: Tensor | GroupedWeight) -> ReplicatedLinear:
    rows, columns = (weight if isinstance(weight, Tensor) else weight.codes).shape
    layer = ReplicatedLinear(context(name), "x", columns, rows, bias=False)
    filled(layer, {"x.weight": weight})
    return layer


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def test_the_flag_knows_every_format() -> None:
    assert sorted(QUANTIZATIONS) == sorted(["auto", *METHODS])
    assert sorted(ERRORS) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_plain_weights_lose_no_more_than_their_codes(name: str) -> None:
    weight, x = random(80, IN_FEATURES), random(9, IN_FEATURES, seed=1)
    error = relative_error(replicated(name, weight)(x), product(x, weight))
    assert error <= ERRORS[name]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [name for name in METHODS if QUANT_METHODS.get(name).takes_codes])
def test_codes_of_the_file_lose_no_more_than_plain_weights(name: str, bits: int) -> None:
    codes = linear_wna16.quantize_weight(random(80, IN_FEATURES), bits, 32, symmetric=False)
    x = random(9, IN_FEATURES, seed=1)
    error = relative_error(replicated(name, codes)(x), product(x, codes.dequantize()))
    taken_over = name == "stored" or getattr(QUANT_METHODS.get(name), "bits", None) == bits
    assert error <= (CODES_ERROR if taken_over else ERRORS[name])


@pytest.mark.parametrize(("name", "rounded"), [("stored", True), ("w4a8", True), ("w4a16", False), ("int8", False)])
def test_activations_are_rounded_where_the_format_says_so(name: str, rounded: bool) -> None:
    """A value far below the others of its group is 0 as int8, and counts in any float."""
    layer = replicated(name, linear_wna16.quantize_weight(random(80, IN_FEATURES), 4, 32))
    x = torch.zeros(2, IN_FEATURES)
    x[:, 0], x[1, 1] = 100, 0.1
    alone, beside = layer(x)
    assert torch.equal(alone, beside) == rounded


@pytest.mark.parametrize("name", METHODS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(name: str) -> None:
    layer, x = replicated(name, random(80, IN_FEATURES)), random(70, IN_FEATURES, seed=1)
    x[3] *= 100  # a row must not share its scale with others
    whole = layer(x)
    for rows in ([0], [3], [69], [1, 3], list(range(5, 38))):
        assert torch.equal(layer(x[rows]), whole[rows])


@pytest.mark.parametrize("name", METHODS)
def test_split_by_output_features_the_ranks_hold_the_bits_of_the_whole(name: str) -> None:
    weight, x = random(48, IN_FEATURES), random(5, IN_FEATURES, seed=1)
    parts = []
    for rank in range(3):
        layer = ColumnParallelLinear(context(name, rank, 3), "x", IN_FEATURES, 48, bias=False)
        filled(layer, {"x.weight": weight})
        parts.append(layer(x))
    assert torch.equal(torch.cat(parts, 1), replicated(name, weight)(x))


@pytest.mark.parametrize("name", METHODS)
def test_split_by_input_features_the_ranks_add_up_to_the_whole(name: str) -> None:
    weight, x = random(48, IN_FEATURES), random(5, IN_FEATURES, seed=1)
    total = torch.zeros(5, 48)
    for rank, columns in enumerate((slice(0, 128), slice(128, 256))):
        layer = RowParallelLinear(context(name, rank, 2), "x", IN_FEATURES, 48, bias=False)
        filled(layer, {"x.weight": weight})
        total += layer(x[:, columns])
    assert relative_error(total, product(x, weight)) <= ERRORS[name]


@pytest.mark.parametrize("name", METHODS)
def test_a_fused_layer_has_the_bits_of_its_parts(name: str) -> None:
    q, k, v = (random(rows, IN_FEATURES, seed=rows) for rows in (64, 32, 32))
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "bias": False}
    layer = QKVParallelLinear(context(name), "a", IN_FEATURES, **options)
    # out of order, as a file may have them
    filled(layer, {"a.v_proj.weight": v, "a.q_proj.weight": q, "a.k_proj.weight": k})
    x = random(5, IN_FEATURES, seed=1)
    assert torch.equal(layer(x), torch.cat([replicated(name, part)(x) for part in (q, k, v)], 1))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("name", METHODS)
def test_a_gate_is_applied_to_the_half_above_it(name: str, act: str) -> None:
    gate, up, x = (random(rows, IN_FEATURES, seed=rows) for rows in (40, 41, 7))
    up = up[:40]
    layer = GatedLinear(context(name), ["gate", "up"], IN_FEATURES, 40, hidden_act=act, bias=True)
    bias = random(40, seed=3)
    filled(layer, {"gate.weight": gate, "up.weight": up, "gate.bias": bias, "up.bias": bias})
    functions = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
    function = functions.get(act, lambda y: torch.nn.functional.gelu(y, approximate="tanh"))
    expected = function(product(x, gate) + bias) * (product(x, up) + bias)
    assert layer(x).shape == (7, 40)
    assert relative_error(layer(x), expected) <= 2 * ERRORS[name]


# Bits and group of each part; None: plain. Q6_K has groups of 16.
MIXED: Sequence[tuple[int, int] | None] = [(4, 32), (8, 32), (4, 64), None, (8, 16)]


@pytest.mark.parametrize("name", [name for name in METHODS if QUANT_METHODS.get(name).takes_codes])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 1, 0), (0, 3, 0), (3, 2, 2), (3, 3, 3), (0, 0, 4)])
def test_parts_that_are_stored_differently_are_one_layer(name: str, order: tuple[int, ...]) -> None:
    """As in Q4_K_M files, whose v has more bits than q and k."""
    parts: list[Tensor | GroupedWeight] = []
    for index, rows in zip(order, (64, 32, 32), strict=True):
        form, weight = MIXED[index], random(rows, IN_FEATURES, seed=rows)
        parts.append(weight if form is None else linear_wna16.quantize_weight(weight, *form, symmetric=False))
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "bias": True}
    layer = QKVParallelLinear(context(name), "a", IN_FEATURES, **options)
    bias = random(128, seed=3)
    tensors: dict[str, Tensor | GroupedWeight] = {}
    for key, part, own in zip("qkv", parts, bias.split([64, 32, 32]), strict=True):
        tensors |= {f"a.{key}_proj.weight": part, f"a.{key}_proj.bias": own}
    filled(layer, tensors)
    weight = torch.cat([part if isinstance(part, Tensor) else part.dequantize() for part in parts])
    x = random(5, IN_FEATURES, seed=1)
    assert relative_error(layer(x), product(x, weight) + bias) <= max(ERRORS[name], CODES_ERROR)


@pytest.mark.parametrize(
    ("name", "codes"),
    [(name, codes) for name in METHODS for codes in (False, True) if QUANT_METHODS.get(name).takes_codes or not codes],
)
def test_a_tied_head_and_its_embedding_hold_one_vocabulary(name: str, codes: bool) -> None:
    """Of 101 rows over two ranks, the last has a row that is nobody's."""
    stored = linear_wna16.quantize_weight(random(101, IN_FEATURES), 8, 32)
    weight, x = stored.dequantize(), random(5, IN_FEATURES, seed=1)
    logits = []
    for rank, ids in enumerate((torch.arange(51), torch.arange(51, 101))):
        own = context(name, rank, 2)
        embedding = VocabEmbedding(own, "embed", 101, IN_FEATURES)
        head = LMHead(own, "head", 101, IN_FEATURES, tied_to=embedding)
        filled(embedding, {"embed.weight": stored if codes else weight})
        head.finish_loading()
        assert torch.equal(embedding(ids), weight[ids])
        logits.append(head(x))
    gathered = torch.cat(logits, 1)
    assert gathered.shape == (5, 102) and not gathered[:, 101:].any()
    assert relative_error(gathered[:, :101], product(x, weight)) <= CODES_ERROR


@pytest.mark.parametrize("name", [name for name in METHODS if QUANT_METHODS.get(name).takes_codes])
def test_ranks_that_would_cut_a_group_are_refused(name: str) -> None:
    codes = linear_wna16.quantize_weight(random(16, 96), 4, 32)
    layer = RowParallelLinear(context(name, 0, 2), "down", 96, 16, bias=False)
    with pytest.raises(ConfigError, match="columns 0 to 48 of 96 are asked for; allowed: whole groups of 32"):
        filled(layer, {"down.weight": codes})


@pytest.mark.parametrize("in_features", [33, 40, 96])
@pytest.mark.parametrize("name", METHODS)
def test_widths_that_no_group_divides(name: str, in_features: int) -> None:
    weight, x = random(16, in_features), random(5, in_features, seed=1)
    assert relative_error(replicated(name, weight)(x), product(x, weight)) <= ERRORS[name]


@pytest.mark.parametrize("name", METHODS)
def test_features_that_no_part_fills_are_zeros(name: str) -> None:
    method = QUANT_METHODS.get(name)(torch.float32, torch.device("cpu"), deterministic=True)
    method.create_weights(16, 64)
    method.load_shard("weight", random(10, 64), Shard(slice(0, 10), slice(None), 0))
    method.finish_loading()
    output = method.apply(random(3, 64), torch.ones(16))
    assert torch.equal(output[:, 10:], torch.ones(3, 6)) and not torch.equal(output[:, :6], torch.ones(3, 6))
