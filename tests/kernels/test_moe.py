"""Owns the tests of moe and of route, which chooses its experts.
Does not know which backends exist (conftest.py)."""

from typing import Any

import pytest
import torch
from servd_kernels import native
from servd_kernels.moe import PackedExperts, moe, pack, reference
from servd_kernels.route import reference as route_reference
from servd_kernels.route import route
from servd_kernels.testing import assert_close
from torch.nn import functional

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # tokens, experts, top_k, hidden, intermediate
    (0, 3, 2, 5, 4),
    (1, 1, 1, 1, 1),
    (1, 4, 2, 67, 35),
    (13, 5, 2, 66, 51),
    (40, 3, 3, 130, 100),
]


def expected(inputs: dict[str, Any], activation: str | None = "silu") -> torch.Tensor:
    """In float64 throughout, each token with each of its experts."""
    x, weights = inputs["x"].double(), inputs["weights"].double()
    out = torch.zeros_like(x)
    for token, chosen in enumerate(inputs["ids"].tolist()):
        for slot, expert in enumerate(chosen):
            if not 0 <= expert < len(inputs["down"]):
                continue
            gate, up = (inputs["gate_up"][expert].double() @ x[token]).chunk(2)
            if activation is not None:
                gate = functional.silu(gate) if activation == "silu" else functional.gelu(gate)
            out[token] += weights[token, slot] * (inputs["down"][expert].double() @ (gate * up))
    return out


def packed_of(inputs: dict[str, Any], backend: str) -> PackedExperts:
    return pack(inputs["gate_up"], inputs["down"], backend)


def rows_of(inputs: dict[str, Any], packed: PackedExperts, rows: Any = slice(None)) -> torch.Tensor:
    return moe(inputs["x"][rows], packed, inputs["weights"][rows], inputs["ids"][rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(*shape, dtype)
    out = rows_of(inputs, packed_of(inputs, backend))
    assert out.shape == inputs["x"].shape and out.dtype == dtype
    assert_close(out, expected(inputs), "gemm")


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_other_activations(backend: str, activation: str | None) -> None:
    inputs = reference.make_inputs(5, 3, 2, 40, 20)
    out = moe(inputs["x"], packed_of(inputs, backend), inputs["weights"], inputs["ids"], activation)
    assert_close(out, expected(inputs, activation), "gemm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 70])
def test_one_expert_takes_all_and_the_others_are_not_read(backend: str, rows: int, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(rows, 4, 1, 67, 50, dtype)
    inputs["ids"].fill_(2)
    for expert in (0, 1, 3):
        inputs["gate_up"][expert] = torch.nan
        inputs["down"][expert] = torch.nan
    out = rows_of(inputs, packed_of(inputs, backend))
    assert out.isfinite().all()
    assert_close(out, expected(inputs), "gemm")


def test_a_slot_without_an_expert_adds_nothing(backend: str) -> None:
    inputs = reference.make_inputs(6, 3, 2, 20, 18)
    inputs["ids"][1, 0], inputs["ids"][2, 1] = -1, 3
    inputs["ids"][4] = -1
    inputs["weights"][4] = torch.nan
    out = rows_of(inputs, packed_of(inputs, backend))
    assert torch.equal(out[4], torch.zeros(20))
    assert_close(out, expected(inputs), "gemm")


def test_nan_stays_in_its_token_and_strided_rows_are_walked(backend: str) -> None:
    inputs = reference.make_inputs(9, 3, 2, 33, 20)
    packed = packed_of(inputs, backend)
    clean = rows_of(inputs, packed)
    wide = torch.full((9, 40), torch.nan)
    wide[:, 3:36] = inputs["x"]
    inputs["x"] = wide[:, 3:36]
    assert torch.equal(rows_of(inputs, packed), clean)
    inputs["x"][4, 32] = torch.nan
    spoiled = rows_of(inputs, packed)
    assert spoiled[4].isnan().all()
    assert torch.equal(torch.cat([spoiled[:4], spoiled[5:]]), torch.cat([clean[:4], clean[5:]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_bits_do_not_depend_on_the_others(backend: str, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(64, 3, 2, 150, 67, dtype)
    packed = packed_of(inputs, backend)
    whole = rows_of(inputs, packed)
    for size in (7, 33):
        parts = [rows_of(inputs, packed, slice(at, at + size)) for at in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    for token in (0, 5, 63):
        assert torch.equal(rows_of(inputs, packed, slice(token, token + 1))[0], whole[token])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rows_of(inputs, packed, order), whole[order])
    many = order.repeat(3)
    assert torch.equal(rows_of(inputs, packed, many), whole[many])


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(70, 5, 2, 150, 120, dtype)
    logits = route_reference.make_inputs(300, 64, dtype)["logits"]
    packed = packed_of(inputs, "cpu")
    results = []
    for threads in (1, 2, 5):
        native.set_num_threads(threads)
        results.append([rows_of(inputs, packed), *route(logits, 8, True, backend="cpu")])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_packed_experts_keep_their_instruction_set() -> None:
    inputs = reference.make_inputs(3, 4, 2, 33, 20)
    packed = packed_of(inputs, "cpu")
    before = rows_of(inputs, packed)
    for isa in reversed(native.isas()):
        native.select_isa(isa)
        assert torch.equal(rows_of(inputs, packed), before)


def test_wrong_experts_and_rows_are_named() -> None:
    inputs = reference.make_inputs(2, 3, 2, 8, 4)
    with pytest.raises(ValueError, match=r"gate_up must be .*\[3, 7, 8\]"):
        pack(inputs["gate_up"][:, :7], inputs["down"])
    with pytest.raises(ValueError, match=r"down must be torch.float32 \[3, 8, 4\]"):
        pack(inputs["gate_up"], inputs["down"][:, :7])
    packed = pack(inputs["gate_up"], inputs["down"])
    x, weights, ids = inputs["x"], inputs["weights"], inputs["ids"]
    with pytest.raises(ValueError, match=r"x must be \[tokens, 8\], not \[2, 7\]"):
        moe(x[:, :7], packed, weights, ids)
    with pytest.raises(ValueError, match="bfloat16"):
        moe(x.bfloat16(), packed, weights, ids)
    with pytest.raises(ValueError, match=r"ids must be torch.int32 \[2, top_k\], not torch.int64"):
        moe(x, packed, weights, ids.long())
    with pytest.raises(ValueError, match=r"weights must be \[2, 2\] like ids, not \[2, 1\]"):
        moe(x, packed, weights[:, :1], ids)
    with pytest.raises(ValueError, match="activation must be one of .* not 'relu'"):
        moe(x, packed, weights, ids, "relu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 3, 1), (1, 1, 1), (5, 8, 2), (19, 37, 5), (3, 130, 8)])
def test_routes_to_the_best(
    backend: str, tokens: int, experts: int, top_k: int, scoring: str, has_bias: bool, dtype: torch.dtype
) -> None:
    inputs = route_reference.make_inputs(tokens, experts, dtype, has_bias)
    logits, bias = inputs["logits"].double(), inputs["bias"]
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = logits if bias is None else scores + bias
    best = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.gather(1, best)
    for renormalize in (False, True):
        weights, ids = route(inputs["logits"], top_k, renormalize, scoring, bias, backend)
        assert ids.dtype == torch.int32 and torch.equal(ids.long(), best)
        assert_close(weights, chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen, "elementwise")


def test_equal_logits_go_to_lower_ids_and_nan_is_the_greatest(backend: str) -> None:
    rows = [[1.0] * 20, [0.0, -0.0] * 10, [-1e4] * 19 + [2.0], [torch.nan] * 20, [0.0] * 17 + [torch.nan, 1.0, 2.0]]
    _, ids = route(torch.tensor(rows), 3, False, "sigmoid", backend=backend)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2], [19, 0, 1], [0, 1, 2], [17, 19, 18]]


def test_scores_that_vanish_are_not_divided_by_zero(backend: str) -> None:
    weights, ids = route(torch.full((1, 4), -1000.0), 2, True, "sigmoid", backend=backend)
    assert ids.tolist() == [[0, 1]]
    assert (weights < 1e-15).all() and weights.isfinite().all()


def test_a_tokens_route_does_not_depend_on_the_others(backend: str) -> None:
    logits = route_reference.make_inputs(40, 37)["logits"]
    weights, ids = route(logits, 4, True, backend=backend)
    for rows in (slice(3, 4), slice(20, 27), torch.arange(39, -1, -1)):
        some, chosen = route(logits[rows], 4, True, backend=backend)
        assert torch.equal(some, weights[rows]) and torch.equal(chosen, ids[rows])


def test_wrong_routes_are_named() -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"logits must be \[tokens, num_experts\], not \[4\]"):
        route(logits[0], 1, False)
    with pytest.raises(ValueError, match="top_k must be 1 to num_experts, 4, not 5"):
        route(logits, 5, False)
    with pytest.raises(ValueError, match="scoring must be one of softmax, sigmoid, not 'top'"):
        route(logits, 1, False, "top")
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[4\], not torch.float32 \[3\]"):
        route(logits, 1, False, bias=torch.zeros(3))
