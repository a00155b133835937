"""Owns the tests of sample: every backend against an oracle that sorts, statistics of the draw, failures, bits.
Does not know which backends exist (conftest.py)."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servd_kernels import native
from servd_kernels.sample import FAILURES, LogitBias, SampleOutput, SampleParams, TokenHistory, sample
from servd_kernels.sample.philox import uniform
from servd_kernels.sample.reference import make_inputs

NATIVE_VARIANTS = [f"cpu-{isa}" for isa in native.isas()]
INFINITY = float("inf")


@dataclass
class Row:
    """The settings of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    num_logprobs: int = -1
    bias: dict[int, float] = field(default_factory=dict)
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0


def offsets(parts: list[Any]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum([len(part) for part in parts])], dtype=torch.int32)


def make_params(rows: list[Row], **more: Any) -> SampleParams:
    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype)

    biases, histories = [list(row.bias.items()) for row in rows], [row.prompt + row.output for row in rows]
    flat = [entry for part in biases for entry in part]
    bias = LogitBias(
        offsets(biases),
        torch.tensor([token for token, _ in flat], dtype=torch.int32),
        torch.tensor([value for _, value in flat], dtype=torch.float32),
    )
    history = TokenHistory(
        offsets(histories),
        torch.tensor(sum(histories, []), dtype=torch.int32),
        torch.tensor([len(row.prompt) for row in rows], dtype=torch.int32),
        *(column(name, torch.float32) for name in ("repetition", "presence", "frequency")),
    )
    return SampleParams(
        *(column(name, torch.float64) for name in ("temperature", "top_p", "min_p")),
        *(column(name, torch.int64) for name in ("top_k", "seed", "position", "num_logprobs")),
        max_logprobs=max(row.num_logprobs for row in rows),
        bias=bias if flat else None,
        history=history if any(histories) else None,
        **more,
    )


def draw(backend: str, logits: torch.Tensor, rows: list[Row], **more: Any) -> SampleOutput:
    return sample(logits, make_params(rows, **more), backend)


def oracle_distribution(logits: torch.Tensor, row: Row) -> np.ndarray:
    """What a row's draw should follow, in float64, by sorting everything; before any penalty."""
    x = logits.double().numpy().copy()
    for token, value in row.bias.items():
        x[token] += value
    order = np.lexsort((np.arange(len(x)), -x))
    if row.temperature == 0:
        return np.eye(len(x))[order[0]]
    p = np.exp((x - x.max()) / row.temperature)
    if row.top_k:
        p[order[row.top_k :]] = 0
    if row.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= row.top_p * p.sum()]] = 0
    p[p < row.min_p] = 0
    return p / p.sum()


def oracle_token(logits: torch.Tensor, row: Row) -> int:
    (u,) = uniform(torch.tensor([row.seed]), torch.tensor([row.position])).tolist()
    return int(np.searchsorted(np.cumsum(oracle_distribution(logits, row)), u, side="right"))


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1e-5},
    {"temperature": 1e6},
    {"top_k": 1},
    {"top_k": 5, "temperature": 2.0},
    {"top_k": 90, "temperature": 4.0},
    {"top_k": 10**6},
    {"top_p": 0.317, "temperature": 2.0},
    {"top_p": 0.917, "temperature": 5.0},
    {"top_p": 1e-9},
    {"top_p": 1 - 1e-12},
    {"min_p": 0.03, "temperature": 2.0},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.817, "min_p": 0.01, "temperature": 3.0},
    {"bias": {1: 90.0, 2: -INFINITY, 3: 91.5}},
]


@pytest.mark.parametrize("vocab_size", [97, 4099])  # 4099: more than one tile, and an odd rest
def test_every_option_gives_the_oracles_token(backend: str, vocab_size: int) -> None:
    rows = [Row(seed=-i, position=1 << 2 * i, **options) for i, options in enumerate(OPTIONS * 2)]
    logits = make_inputs(len(rows), vocab_size, seed=3)["logits"]
    found = draw(backend, logits, rows)
    assert not found.failures.any()
    assert found.token_ids.tolist() == [oracle_token(x, row) for x, row in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("top_k", [700, 3000])  # more than there are blocks: no bound from their maxima
def test_a_top_k_that_keeps_much_of_the_vocabulary(backend: str, top_k: int) -> None:
    logits = make_inputs(6, 4500, spread=0.5, seed=5)["logits"]
    rows = [Row(top_k=top_k, top_p=(1.0, 0.917)[i % 2], seed=i, position=9) for i in range(6)]
    expected = [oracle_token(x, row) for x, row in zip(logits, rows, strict=True)]
    assert draw(backend, logits, rows).token_ids.tolist() == expected


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_filters_keep_the_oracles_tokens_even_among_equals(backend: str, data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([3, 33, 70, 300]))
    values = data.draw(st.lists(st.sampled_from([-INFINITY, -2.5, -0.0, 0.0, 1.0, 3.0]), min_size=2, max_size=9))
    logits = torch.tensor((values * vocab_size)[:vocab_size]).expand(6, -1).contiguous()
    options = {
        "top_k": data.draw(st.sampled_from([0, 1, 2, 7, 40])),
        "top_p": data.draw(st.sampled_from([1.0, 0.1371, 0.5177, 0.9731])),  # no sum of these weights hits them
        "min_p": data.draw(st.sampled_from([0.0, 0.15, 1.0])),
        "temperature": data.draw(st.sampled_from([0.0, 0.9, 2.3])),
    }
    rows = [Row(seed=7, position=i, **options) for i in range(6)]
    found = draw(backend, logits, rows)
    if float(logits[0].max()) == -INFINITY:
        assert found.failures.tolist() == [3] * 6
        return
    assert found.token_ids.tolist() == [oracle_token(logits[0], row) for row in rows]


# Thousands of draws: too many for Triton's interpreter, whose tokens are held to the oracle's above.
@pytest.mark.parametrize("backend", ["reference", *NATIVE_VARIANTS], indirect=True)
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.817}, {"top_k": 12, "top_p": 0.6, "min_p": 0.1}])
def test_draws_follow_the_distribution(backend: str, options: dict[str, Any]) -> None:
    count = 3000
    logits = make_inputs(1, 24, spread=1.5, seed=1)["logits"].expand(count, -1).contiguous()
    rows = [Row(seed=41, position=i, **options) for i in range(count)]
    expected = oracle_distribution(logits[0], rows[0]) * count
    observed = np.bincount(draw(backend, logits, rows).token_ids.numpy(), minlength=24)
    assert (observed[expected == 0] == 0).all()
    common = expected >= 5  # the chi-square statistic wants no rare classes: these are one
    classes = np.append(expected[common], expected[~common].sum()), np.append(observed[common], observed[~common].sum())
    statistic = sum((o - e) ** 2 / max(e, 1.0) for e, o in zip(*classes, strict=True))
    degrees = int(common.sum())
    # p = 0.001 by Wilson and Hilferty's approximation of the chi-square quantile
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3


def test_penalties_are_those_of_prompt_and_output(backend: str) -> None:
    logits = torch.tensor([3.0, -1.0, 2.9, 2.8, 2.7, -9.0]).repeat(5, 1)
    rows = [
        Row(0.0, prompt=[0, 0, 5], repetition=2.0),  # 1.5, so 2.9 wins
        Row(0.0, output=[0, 2, 2, 3], frequency=0.15),  # 2.85, 2.6, 2.65
        Row(0.0, prompt=[2], output=[0, 0], presence=0.15, frequency=0.0),  # 2.85; the prompt's 2 is left alone
        Row(0.0, prompt=[0, 2, 3, 4], output=[1], repetition=0.01, presence=150.0),  # 0.01 * -1 - 150; 300
        Row(0.0, prompt=[0], output=[2], repetition=4.0, presence=-3.0),  # 0.75; 0.725 + 3
    ]
    assert draw(backend, logits, rows).token_ids.tolist() == [2, 0, 2, 0, 2]


def test_a_bias_comes_before_penalties(backend: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0]])
    rows = [Row(0.0, bias={0: 9.0}, prompt=[0], repetition=2.0), Row(0.0, bias={0: 12.0}, prompt=[0], repetition=2.0)]
    assert draw(backend, logits, rows).token_ids.tolist() == [2, 0]  # (1 + 9) / 2 < 6 < (1 + 12) / 2


def pack_mask(mask: np.ndarray) -> torch.Tensor:
    """[rows, vocab] bool → [rows, ceil(vocab / 32)] int32"""
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


@pytest.mark.parametrize("vocab_size", [5, 64, 97, 4099])
def test_only_allowed_tokens_are_chosen(backend: str, vocab_size: int) -> None:
    logits = make_inputs(8, vocab_size, seed=2)["logits"]
    mask = np.random.default_rng(vocab_size).random((8, vocab_size)) < 0.3
    mask[0], mask[1], mask[2:, 0] = True, False, True
    mask[3] = np.arange(vocab_size) == vocab_size - 1
    rows = [Row(seed=i, temperature=float(i % 3), num_logprobs=1) for i in range(8)]
    found = draw(backend, logits, rows, allowed=pack_mask(mask))
    masked = logits.masked_fill(torch.from_numpy(~mask), -INFINITY)
    assert found.failures.tolist() == [0, 3, 0, 0, 0, 0, 0, 0]
    for i in (0, 2, 3, 4, 5, 6, 7):
        assert found.token_ids[i] == oracle_token(masked[i], rows[i])
        assert found.top_token_ids[i, 0] == logits[i].argmax(), "alternatives are the raw model's"


def test_logprobs_are_those_of_the_raw_logits(backend: str) -> None:
    logits = make_inputs(6, 4099, seed=8)["logits"]
    counts = [3, -1, 0, 20, 1, 3]
    rows = [Row(0.5, top_k=9, seed=i, num_logprobs=n, bias={5: 80.0}) for i, n in enumerate(counts)]
    found = draw(backend, logits, rows)
    expected = torch.log_softmax(logits.double(), dim=-1)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    assert found.top_token_ids.shape == found.top_logprobs.shape == (6, 20)
    for i, n in enumerate(counts):
        token = int(found.token_ids[i])
        assert found.ranks[i] == (0 if n < 0 else 1 + int((logits[i] > logits[i, token]).sum()))
        assert float(found.logprobs[i]) == pytest.approx(0.0 if n < 0 else float(expected[i, token]), abs=2e-6)
        n = max(n, 0)
        assert found.top_token_ids[i].tolist() == order[i, :n].tolist() + [-1] * (20 - n)
        wanted = expected[i, order[i, :n]].tolist() + [0.0] * (20 - n)
        assert found.top_logprobs[i].tolist() == pytest.approx(wanted, abs=2e-6)


def test_alternatives_end_with_the_vocabulary_and_equals_go_by_id(backend: str) -> None:
    logits = torch.tensor([[1.0, -INFINITY, 2.0, 1.0, -INFINITY]])
    found = draw(backend, logits, [Row(0.0, num_logprobs=7)])
    assert found.top_token_ids.tolist() == [[2, 0, 3, 1, 4, -1, -1]]
    assert found.top_logprobs[0, 3:].tolist() == [-INFINITY, -INFINITY, 0.0, 0.0]


def test_given_tokens_are_reported_on(backend: str) -> None:
    logits = make_inputs(4, 300, seed=4)["logits"]
    tokens = [0, 299, 300, -1]
    rows = [Row(num_logprobs=2, bias={3: 50.0}) for _ in tokens]
    found = draw(backend, logits, rows, given=torch.tensor(tokens, dtype=torch.int32))
    assert found.failures.tolist() == [0, 0, 4, 4] and found.token_ids.tolist() == [0, 299, 0, 0]
    expected = torch.log_softmax(logits.double(), dim=-1)
    wanted = [float(expected[0, 0]), float(expected[1, 299]), 0.0, 0.0]
    assert found.logprobs.tolist() == pytest.approx(wanted, abs=2e-6)
    assert found.ranks.tolist()[2:] == [0, 0] and found.top_token_ids[2:].eq(-1).all()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3}, {}], ids=str)
def test_spoilt_rows_fail_alone_and_say_why(backend: str, options: dict[str, Any]) -> None:
    logits = make_inputs(8, 200, seed=6)["logits"]
    rows = [Row(seed=i, num_logprobs=1, **options) for i in range(8)]
    fine = draw(backend, logits, rows)
    spoilt = logits.clone()
    spoilt[1, 199], spoilt[2, 7], spoilt[3] = float("nan"), INFINITY, -INFINITY
    spoilt[6] = float("nan")
    rows[4], rows[5] = replace(rows[4], bias={200: 1.0}), replace(rows[5], prompt=[3, -1], repetition=2.0)
    rows[6] = replace(rows[6], bias={-1: 1.0})
    found = draw(backend, spoilt, rows)
    assert found.failures.tolist() == [0, 1, 2, 3, 4, 4, 1, 0]
    assert [FAILURES[code] != "" for code in found.failures] == [False, *[True] * 6, False]
    assert torch.equal(found.packed[[0, 7]], fine.packed[[0, 7]])
    assert not found.ranks[1:7].any() and not found.token_ids[1:7].any()


def mixed_rows(count: int, vocab_size: int) -> list[Row]:
    rng = np.random.default_rng(11)
    rows = []
    for i in range(count):
        tokens = rng.integers(0, vocab_size, 6).tolist()
        rows.append(
            Row(
                temperature=float(rng.choice([0.0, 0.6, 1.7])),
                top_k=int(rng.choice([0, 3, 80])),
                top_p=float(rng.choice([1.0, 0.5, 0.97])),
                min_p=float(rng.choice([0.0, 0.05])),
                seed=i,
                position=i * i,
                num_logprobs=int(rng.choice([-1, 0, 4])),
                bias={1: 3.3, 7: -INFINITY} if i % 3 == 0 else {},
                prompt=tokens[:3] if i % 2 else [],
                output=tokens[3:] if i % 2 else [],
                repetition=1.3,
                presence=0.4,
                frequency=0.77,
            )
        )
    return rows


def test_a_row_alone_in_a_few_and_elsewhere(backend: str) -> None:
    count, vocab_size = 12, 4500
    logits, rows = make_inputs(count, vocab_size, seed=9)["logits"], mixed_rows(count, vocab_size)
    whole = draw(backend, logits, rows)
    top = max(row.num_logprobs for row in rows)

    def part(indices: list[int]) -> torch.Tensor:
        params = replace(make_params([rows[i] for i in indices]), max_logprobs=top)
        return sample(logits[indices], params, backend).packed

    for size in (1, 5):
        parts = [part(list(range(i, min(i + size, count)))) for i in range(0, count, size)]
        assert torch.equal(torch.cat(parts), whole.packed), f"in parts of {size}"
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(part(order), whole.packed[order])


@pytest.mark.parametrize("backend", NATIVE_VARIANTS, indirect=True)
def test_threads_change_nothing(backend: str, restore_threads: None) -> None:
    logits, rows = make_inputs(40, 3001, seed=9)["logits"], mixed_rows(40, 3001)
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        results.append(draw(backend, logits, rows).packed)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_strided_rows_are_read_where_they_lie_and_left_as_they_are(backend: str) -> None:
    rows = mixed_rows(6, 130)
    wide = torch.full((6, 200), float("nan"))
    wide[:, :130] = make_inputs(6, 130, seed=2)["logits"]
    before = wide.clone()
    found = draw(backend, wide[:, :130], rows)
    assert torch.equal(found.packed, draw(backend, wide[:, :130].contiguous(), rows).packed)
    assert torch.equal(wide.nan_to_num(7.0), before.nan_to_num(7.0))


def test_flat_and_spiked_rows_are_searched_through(backend: str) -> None:
    logits = torch.zeros(4, 4500)
    logits[1, 3000], logits[2, 17], logits[3] = 1e30, -1e30, -3e38
    rows = [Row(top_p=0.5001, seed=i) for i in range(4)]
    found = draw(backend, logits, rows)
    assert found.token_ids.tolist() == [oracle_token(x, row) for x, row in zip(logits, rows, strict=True)]


def test_no_rows_give_no_answers(backend: str) -> None:
    assert sample(torch.zeros(0, 9), make_inputs(0, 9)["params"], backend).packed.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": torch.ones(2)}, r"top_p must be .*float64 \[2\]"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds must be .*int64 \[2\] .* not .*\[3\]"),
        ({"allowed": torch.zeros(2, 1, dtype=torch.int32)}, r"allowed must be .*\[2, 2\]"),
        ({"given": torch.zeros(2)}, "given must be"),
        ({"max_logprobs": -2}, "max_logprobs is -2; allowed"),
        ({"bias": LogitBias(torch.zeros(2).int(), torch.zeros(0).int(), torch.zeros(0))}, r"offsets must be .*\[3\]"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(2, 40), replace(make_inputs(2, 40)["params"], **change))


def test_wrong_logits_are_named() -> None:
    params = make_inputs(2, 40)["params"]
    for logits in (torch.zeros(2, 40).double(), torch.zeros(40), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="logits must be float32"):
            sample(logits, params)
