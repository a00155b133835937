"""The norm layers and the activations by name, against torch's and transformers' own.

Knows nothing of kernels (tests/kernels) or whole models.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from servd.distributed.group import TPGroup
from servd.errors import ConfigError
from servd.layers.activation import activation, gated_activation
from servd.layers.base import LayerContext
from servd.layers.norm import LayerNorm, RMSNorm
from servd.quant.none import DenseWeights

SIZE = 48
CONTEXT = LayerContext(torch.float32, torch.device("cpu"), TPGroup.single(), DenseWeights)
GELU_NAMES = ["gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"]


@pytest.mark.parametrize("name", ["silu", "swish", *GELU_NAMES])
def test_gated_activations_are_those_of_transformers(name: str) -> None:
    gate_up = torch.randn(5, 2 * SIZE)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(gated_activation(name, CONTEXT, SIZE)(gate_up), ACT2FN[name](gate) * up)


@pytest.mark.parametrize("name", GELU_NAMES)
def test_plain_activations_are_those_of_transformers(name: str) -> None:
    x = torch.randn(5, SIZE)
    torch.testing.assert_close(activation(name, CONTEXT, SIZE)(x), ACT2FN[name](x))


def test_unknown_activations_are_answered_with_the_known() -> None:
    with pytest.raises(ConfigError, match="hidden_act is 'relu'; allowed: silu, swish, gelu, gelu_pytorch_tanh"):
        gated_activation("relu", CONTEXT, SIZE)
    with pytest.raises(ConfigError, match="hidden_act is 'silu'; allowed: gelu, "):
        activation("silu", CONTEXT, SIZE)


@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_loads_its_weights_and_adds_the_residual(has_bias: bool) -> None:
    layer = LayerNorm(CONTEXT, "norm", SIZE, 1e-5, bias=has_bias)
    weights = {"norm.weight": torch.randn(SIZE)} | ({"norm.bias": torch.randn(SIZE)} if has_bias else {})
    slots = layer.weight_slots()
    assert {name: slot.shape for name, slot in slots.items()} == dict.fromkeys(weights, (SIZE,))
    for name, tensor in weights.items():
        slots[name].load(tensor)
    x, residual = torch.randn(2, 5, SIZE)
    parameters = (weights["norm.weight"], weights.get("norm.bias"), 1e-5)
    torch.testing.assert_close(layer(x), functional.layer_norm(x, (SIZE,), *parameters))
    output, total = layer.add(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(output, functional.layer_norm(total, (SIZE,), *parameters))


def test_rms_norm_loads_its_weight_and_adds_the_residual() -> None:
    layer = RMSNorm(CONTEXT, "norm", SIZE, 1e-5)
    weight = torch.randn(SIZE)
    layer.weight_slots()["norm.weight"].load(weight)
    x, residual = torch.randn(2, 5, SIZE)
    torch.testing.assert_close(layer(x), functional.rms_norm(x, (SIZE,), weight, 1e-5))
    output, total = layer.add(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(output, functional.rms_norm(total, (SIZE,), weight, 1e-5))
