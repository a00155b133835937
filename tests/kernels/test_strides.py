"""Owns the tests that tensors with gaps between neighbours are refused, where a kernel would misread them.
Does not know any op's arithmetic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from servd_kernels.copy_blocks import copy_blocks
from servd_kernels.linear import linear, pack
from servd_kernels.paged_attention import paged_attention
from servd_kernels.paged_attention import reference as attention_reference
from servd_kernels.rms_norm import reference as norm_reference
from servd_kernels.rms_norm import rms_norm
from servd_kernels.rope_and_cache import reference as rope_reference
from servd_kernels.rope_and_cache import rope_and_cache


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, two elements apart."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def run_linear(**inputs: Any) -> torch.Tensor:
    return linear(inputs["x"], pack(inputs["weight"]), inputs["bias"])


def linear_inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4)}


OPS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]], list[str]]] = [
    (run_linear, linear_inputs, ["bias"]),
    (rms_norm, lambda: norm_reference.make_inputs(3, 8), ["weight"]),
    (
        paged_attention,
        lambda: attention_reference.make_inputs([3, 1], [9, 40], 4, 2, 16),
        ["q", "cu_seqlens_q", "seq_lens"],
    ),
    (
        rope_and_cache,
        lambda: rope_reference.make_inputs(5, 3, 1, 16),
        ["q", "k", "v", "positions", "cos_sin", "slot_mapping"],
    ),
]
CASES = [(run, make_inputs, name) for run, make_inputs, names in OPS for name in names]


@pytest.mark.parametrize(("run", "make_inputs", "name"), CASES, ids=[f"{c[0].__name__}-{c[2]}" for c in CASES])
def test_gaps_are_refused_by_name(run: Callable[..., Any], make_inputs: Callable[[], Any], name: str) -> None:
    inputs = make_inputs()
    inputs[name] = with_gaps(inputs[name])
    with pytest.raises(ValueError, match=rf"^{name} must "):
        run(**inputs)


def test_layers_of_unequal_strides_are_each_copied_by_their_own(backend: str) -> None:
    wide = torch.arange(48.0).view(4, 12)
    caches = [torch.arange(24.0).view(4, 6), wide[:, :6]]
    before = [cache.clone() for cache in caches]
    copy_blocks(caches, torch.tensor([0]), torch.tensor([3]), backend=backend)
    for old, new in zip(before, caches, strict=True):
        assert torch.equal(new, old[[0, 1, 2, 0]])
    assert torch.equal(wide[:, 6:], torch.arange(48.0).view(4, 12)[:, 6:])
