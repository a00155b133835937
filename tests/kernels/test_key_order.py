"""Owns the tests of the order in which four-bit keys are stored.
Does not know the cache or the model."""

import pytest
import torch
from servd_kernels.key_order import key_order
from servd_kernels.kv_format import CODES, decode, encode, hadamard


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (80, 32), (24, 0)])
def test_is_a_permutation(head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    energy = torch.rand(3, head_dim, generator=torch.Generator().manual_seed(0))
    order = key_order(energy, rotary_dim, interleaved, group=32)
    assert order.dtype == torch.int32
    assert (order.sort(-1).values == torch.arange(head_dim)).all()


def test_the_strongest_pair_goes_to_the_functions_that_are_constant_in_a_group() -> None:
    energy = torch.ones(1, 64)
    energy[0, 37] = 9.0
    (order,) = key_order(energy, 64, False, group=32)
    assert {int(order[0]), int(order[32])} == {5, 37}


def test_a_rotation_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(500, 1, 32, generator=generator) * torch.rand(32, generator=generator)
    angle = torch.rand(500, 1, 16, generator=generator) * 7
    first, second = keys[..., :16], keys[..., 16:]
    turned = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    orders = [key_order(x.square().sum(0), 32, False, group=16) for x in (keys, turned)]
    assert torch.equal(*orders)


def test_four_bits_keep_more_of_keys_with_strong_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(400, 1, 64, generator=generator)
    keys[..., [20, 52]] = 20 + keys[..., [20, 52]]  # a slow rotary pair: large, and nearly the same in all tokens
    order = key_order(keys.square().sum(0), 64, False, group=32).long()

    def error(x: torch.Tensor) -> float:
        codes, params = encode(hadamard(x), CODES["int4"])
        return float((hadamard(decode(codes, params, CODES["int4"])) - x).square().mean())

    assert error(keys[:, :, order[0]]) < 0.5 * error(keys)
