"""Owns the tests of rope_and_cache.
Does not know which backends exist (conftest.py)."""

from typing import Any

import pytest
import torch
from servd_kernels.rope_and_cache import reference, rope_and_cache
from servd_kernels.testing import assert_close

# tokens, query heads, kv heads, head_dim, rotary_dim, block size
SHAPES = [
    (1, 1, 1, 8, 8, 1),
    (5, 3, 1, 24, 24, 3),
    (37, 9, 3, 64, 64, 16),
    (7, 4, 2, 80, 32, 7),
    (9, 2, 2, 16, 0, 4),
]


def expected_rotation(inputs: dict[str, Any], x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """By complex numbers, in float64."""
    cos, sin = inputs["cos_sin"][inputs["positions"]].double().chunk(2, -1)
    turn = torch.complex(cos, sin).unsqueeze(1)
    half = cos.shape[-1]
    x = x.double()
    if interleaved:
        pairs = torch.complex(x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]) * turn
        turned = torch.view_as_real(pairs).flatten(-2)
    else:
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        turned = torch.cat([pairs.real, pairs.imag], -1)
    return torch.cat([turned, x[..., 2 * half :]], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotates_and_writes(backend: str, shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool) -> None:
    inputs = reference.make_inputs(*shape, dtype=dtype)
    q, k, v, cache, kv_format = (inputs[name] for name in ("q", "k", "v", "kv_cache", "kv_format"))
    old_k, old_v = k.clone(), v.clone()
    expected_q = expected_rotation(inputs, q, interleaved)
    expected_k = expected_rotation(inputs, k, interleaved)
    out = rope_and_cache(**inputs, interleaved=interleaved, backend=backend)
    assert out.data_ptr() == q.data_ptr()
    assert torch.equal(k, old_k) and torch.equal(v, old_v)
    assert_close(q, expected_q, "elementwise")
    kept = inputs["slot_mapping"] >= 0
    slots = inputs["slot_mapping"][kept]
    assert_close(kv_format.read(cache, kv_format.k, slots).to(dtype), expected_k[kept], "elementwise")
    assert torch.equal(kv_format.read(cache, kv_format.v, slots).to(dtype), v[kept])
    others = torch.ones(len(cache) * kv_format.block_size, dtype=torch.bool)
    others[slots] = False
    others = others.nonzero().flatten()
    assert all(kv_format.read(cache, side, others).isnan().all() for side in (kv_format.k, kv_format.v))


@pytest.mark.parametrize(
    ("name", "value"),
    [("positions", -1), ("positions", 10**6), ("slot_mapping", 10**6), ("slot_mapping", -2)],
)
def test_values_out_of_range_are_refused(backend: str, name: str, value: int) -> None:
    inputs = reference.make_inputs(3, 2, 1, 8)
    inputs[name][1] = value
    with pytest.raises(ValueError, match=name[:4]):
        rope_and_cache(**inputs, backend=backend)
    assert (inputs["kv_cache"] == 0xFF).all()


def test_wrong_shapes_are_named() -> None:
    inputs = reference.make_inputs(3, 2, 1, 8)
    with pytest.raises(ValueError, match=r"k must be \[3, 1, 8\]"):
        rope_and_cache(**{**inputs, "k": inputs["k"][:2]})
