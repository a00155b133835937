"""Owns the tests of rope_and_cache.
Does not know which backends exist (conftest.py)."""

from typing import Any

import pytest
import torch
from servd_kernels import native
from servd_kernels.kv_format import CODES
from servd_kernels.rope_and_cache import reference, rope_and_cache
from servd_kernels.testing import assert_close

NATIVE_VARIANTS = [f"cpu-{isa}" for isa in native.isas()]

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


CODE_PAIRS = [*((code, code) for code in CODES), ("bfloat16", "int8"), ("int8", "int4"), ("int4", "fp8_e4m3")]


def bits_of_cache(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Codes and parameters of all slots; parameters as numbers, so that zeros of both signs are one."""
    cache, kv_format = inputs["kv_cache"], inputs["kv_format"]
    sides = (kv_format.k, kv_format.v)
    return [kv_format.codes(cache, side) for side in sides] + [kv_format.params(cache, side) for side in sides]


def assert_same_cache(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(bits_of_cache(actual), bits_of_cache(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def layouts(backend: str) -> list[bool]:
    """The values of key_words that a backend has: GPUs read rows."""
    return [False] if backend == "triton" else [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pair", CODE_PAIRS)
def test_codes_and_scales_are_those_of_the_reference(backend: str, pair: tuple[str, str], dtype: torch.dtype) -> None:
    for key_words in layouts(backend):
        for shape in ((19, 4, 2, 64, 64, 16), (5, 3, 1, 80, 32, 7), (3, 1, 1, 24, 24, 3)):
            arguments = {"dtype": dtype, "key": pair[0], "value": pair[1], "key_words": key_words}
            actual, expected = (reference.make_inputs(*shape, **arguments) for _ in range(2))
            rope_and_cache(**actual, backend=backend)
            reference.run(**expected)
            assert_same_cache(actual, expected)
            assert torch.equal(actual["q"], expected["q"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("code", CODES)
def test_numbers_of_every_size_keep_the_reference_s_bits(backend: str, code: str) -> None:
    arguments = {"dtype": torch.float32, "key": code, "value": code}
    actual, expected = (reference.make_inputs(40, 1, 2, 32, **arguments) for _ in range(2))
    sizes = torch.logspace(-12, 6, 40)[:, None, None]
    for inputs in (actual, expected):
        for name in ("k", "v"):
            inputs[name] = inputs[name] * sizes
            inputs[name][3] = 0.0
            inputs[name][4, :, ::2] = 0.0
            inputs[name][5] = 0.25
    rope_and_cache(**actual, backend=backend)
    reference.run(**expected)
    assert_same_cache(actual, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("code", ["bfloat16", "float16", "fp8_e4m3", "int8", "int4"])
def test_nan_and_infinity_are_not_hidden(backend: str, code: str, bad: float) -> None:
    inputs = reference.make_inputs(5, 1, 2, 64, rotary_dim=0, key=code, value=code)
    kv_format, slots = inputs["kv_format"], inputs["slot_mapping"]
    for name in ("k", "v"):
        inputs[name][2, 1, 63] = bad
    rope_and_cache(**inputs, backend=backend)
    for side in (kv_format.k, kv_format.v):
        stored = kv_format.read(inputs["kv_cache"], side, slots)
        assert not stored[2, 1, 63].isfinite()
        if side.code.num_params:
            assert stored[2, 1].isnan().all()
        assert stored[2, 0].isfinite().all() and stored[3].isfinite().all()


def test_rotated_keys_keep_their_dot_products_with_queries(backend: str) -> None:
    plain, rotated = (reference.make_inputs(6, 2, 1, 64, key=key, value="float32") for key in ("float32", "int4"))
    scores = []
    for inputs in (plain, rotated):
        q = rope_and_cache(**inputs, backend=backend)
        keys = inputs["kv_format"].read(inputs["kv_cache"], inputs["kv_format"].k, inputs["slot_mapping"])
        scores.append(torch.einsum("nhd,thd->nht", q, keys))
    error = scores[1] - scores[0]
    assert error.norm() < 0.12 * scores[0].norm()  # the error of 4 bits, not that of another basis


def test_an_order_of_dimensions_keeps_dot_products_and_the_reference_s_bits(backend: str) -> None:
    arguments = {"dtype": torch.float32, "key": "int4", "value": "int4", "key_words": layouts(backend)[-1]}
    plain, ordered, expected = (reference.make_inputs(6, 4, 2, 64, **arguments) for _ in range(3))
    order = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]).int()
    scores = []
    for inputs, key_order in ((plain, None), (ordered, order)):
        q = rope_and_cache(**inputs, key_order=key_order, backend=backend)
        keys = inputs["kv_format"].read(inputs["kv_cache"], inputs["kv_format"].k, inputs["slot_mapping"])
        scores.append(torch.einsum("nhd,thd->nht", q, keys.repeat_interleave(2, 1)))
    assert (scores[1] - scores[0]).norm() < 0.15 * scores[0].norm()
    reference.run(**expected, key_order=order)
    assert_same_cache(ordered, expected)
    assert torch.equal(ordered["q"], expected["q"])


@pytest.mark.parametrize("key_words", [False, True])
def test_a_token_s_bytes_do_not_depend_on_its_batch(backend: str, key_words: bool) -> None:
    key_words = key_words and backend != "triton"
    whole, parts = (reference.make_inputs(23, 2, 2, 64, key="int8", value="int4", key_words=key_words) for _ in "12")
    rope_and_cache(**whole, backend=backend)
    for rows in torch.arange(23).flip(0).split(5):
        step = dict(parts)
        for name in ("q", "k", "v", "positions", "slot_mapping"):
            step[name] = parts[name][rows]
        q = rope_and_cache(**step, backend=backend)
        assert torch.equal(q, whole["q"][rows])
    assert torch.equal(whole["kv_cache"], parts["kv_cache"])


@pytest.mark.parametrize("backend", NATIVE_VARIANTS, indirect=True)  # torch's threads are not ours to set
def test_threads_change_nothing(backend: str, restore_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        inputs = reference.make_inputs(200, 4, 2, 64, key="int8", value="int4", key_words=True)
        rope_and_cache(**inputs, backend=backend)
        q = inputs["q"].contiguous().view(torch.uint8)
        results.append(torch.cat([inputs["kv_cache"].flatten(), q.flatten()]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_words_are_refused_where_they_cannot_be_written() -> None:
    inputs = reference.make_inputs(3, 2, 1, 8, key_words=True)
    with pytest.raises(ValueError, match="key_words"):
        rope_and_cache(**inputs, backend="triton")


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
