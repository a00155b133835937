"""The sampler against a plain float64 reference, the statistics of its draw, and its independence of batch mates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servd_kernels.sample.philox import uniform

from servd.outputs import NewRequestData
from servd.sampling_params import SamplingParams
from servd.worker.sampler import Sampler, SamplerOutput
from servd.worker.sampling_metadata import SamplingMetadata, SamplingRows

VOCAB = 97


class Row:
    """One request at one step."""

    def __init__(
        self, logits: np.ndarray, *, prompt: list[int] | None = None, output: list[int] | None = None,
        seed: int = 0, stop_token_ids: list[int] | None = None, **params: Any,
    ) -> None:  # fmt: skip
        self.logits = np.asarray(logits, np.float32)
        self.prompt, self.output = prompt or [1, 2, 3], output or []
        self.seed, self.stop_token_ids = seed, stop_token_ids or []
        self.params = SamplingParams(max_tokens=None, **params)
        self.params.validate(len(self.logits))

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)


def make_logits(seed: int, vocab_size: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, vocab_size).astype(np.float32)


def make_metadata(rows: list[Row]) -> SamplingMetadata:
    table = np.zeros((len(rows), max(row.position for row in rows) + 1), np.int32)
    state = SamplingRows(len(rows), len(rows[0].logits))
    for i, row in enumerate(rows):
        tokens = row.prompt + row.output
        table[i, : len(tokens)] = tokens
        new = NewRequestData(
            str(i), tokens, len(row.prompt), row.params, row.seed, row.stop_token_ids, [], max_total_tokens=10**6
        )
        state.set(i, new)
    return state.metadata(np.arange(len(rows)), np.array([row.position for row in rows]), table)


def sample(rows: list[Row]) -> SamplerOutput:
    return Sampler(torch.device("cpu"))(torch.from_numpy(np.stack([row.logits for row in rows])), make_metadata(rows))


def reference_processed(row: Row) -> np.ndarray:
    """Logits after bias, min_tokens and penalties, in float64."""
    x, params = row.logits.astype(np.float64), row.params
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if len(row.output) < params.min_tokens:
        x[row.stop_token_ids] = -np.inf
    for token in set(row.prompt + row.output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(row.output):
        x[token] -= params.frequency_penalty * row.output.count(token) + params.presence_penalty
    return x


def reference_distribution(row: Row) -> np.ndarray:
    """What the draw should follow, in float64, by sorting everything."""
    x, params = reference_processed(row), row.params
    if params.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    p = np.exp((x - x.max()) / params.temperature)
    p /= p.sum()
    order = np.lexsort((np.arange(len(p)), -x))
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    if params.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= params.top_p]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def reference_token(row: Row) -> int:
    p = reference_distribution(row)
    if row.params.temperature == 0:
        return int(p.argmax())
    (u,) = uniform(torch.tensor([row.seed]), torch.tensor([row.position])).tolist()
    return int(np.searchsorted(np.cumsum(p), u, side="right"))


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 2.0, "top_k": 7},
    {"temperature": 2.0, "top_k": VOCAB + 5},
    {"temperature": 2.0, "top_p": 0.5},
    {"temperature": 2.0, "top_p": 0.95},
    {"temperature": 2.0, "top_p": 1e-6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 1.0, "logit_bias": {5: 8.0, 6: -100.0}},
    {"temperature": 0.0, "logit_bias": {5: 100.0}},
    {"temperature": 1.0, "repetition_penalty": 1.8},
    {"temperature": 0.0, "repetition_penalty": 0.2},
    {"temperature": 1.0, "presence_penalty": 1.5},
    {"temperature": 1.0, "frequency_penalty": -1.5},
    {"temperature": 0.0, "frequency_penalty": 2.0, "presence_penalty": -2.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "min_tokens": 20},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 1.0, "logit_bias": {3: 2.0}},
]


def make_rows(options: dict[str, Any], count: int = 40) -> list[Row]:
    rows = []
    for i in range(count):
        rng = np.random.default_rng(i)
        output = rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist()
        prompt = rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist()
        logits = make_logits(i)
        stops = [int(logits.argmax()), 11]
        rows.append(Row(logits, prompt=prompt, output=output * 2, seed=1000 + i, stop_token_ids=stops, **options))
    return rows


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_gives_the_references_token(options: dict[str, Any]) -> None:
    rows = make_rows(options)
    assert sample(rows).token_ids.tolist() == [reference_token(row) for row in rows]


def test_a_mixed_batch_gives_the_references_tokens() -> None:
    rows = [row for options in OPTIONS for row in make_rows(options, 3)]
    assert sample(rows).token_ids.tolist() == [reference_token(row) for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 50},
        {"top_k": 200},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 200, "top_p": 0.9, "min_p": 0.02},
        {"top_k": 200, "min_p": 0.3},
        {"top_p": 0.99, "min_p": 0.05},
    ],
    ids=str,
)
def test_filters_over_a_larger_vocabulary_give_the_references_tokens(options: dict[str, Any]) -> None:
    rows = [Row(make_logits(i, 300), seed=i, temperature=3.0, **options) for i in range(60)]
    assert sample(rows).token_ids.tolist() == [reference_token(row) for row in rows]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.6}])
def test_the_draw_follows_the_distribution(options: dict[str, Any]) -> None:
    count = 6_000
    logits = make_logits(3, 24)
    rows = [Row(logits, seed=seed, temperature=1.5, **options) for seed in range(count)]
    expected = reference_distribution(rows[0]) * count
    observed = np.bincount(sample(rows).token_ids, minlength=24)
    assert (observed[expected == 0] == 0).all()
    common = expected >= 5  # the chi-square statistic wants no rare classes
    rare = expected[~common].sum()
    statistic = ((observed - expected)[common] ** 2 / expected[common]).sum()
    if rare >= 5:
        statistic += (observed[~common].sum() - rare) ** 2 / rare
    degrees = max(1, int(common.sum()) - (rare < 5))
    # p = 0.001 by Wilson and Hilferty's approximation of the chi-square quantile
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3


def test_one_seed_gives_other_draws_at_other_positions() -> None:
    rows = [Row(np.zeros(VOCAB), prompt=[1] * length, seed=5) for length in range(1, 60)]
    assert len(set(sample(rows).token_ids.tolist())) > 30


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = np.zeros(VOCAB)
    logits[[40, 7, 90]] = 2.0
    rows = [Row(logits, temperature=0.0), Row(logits, temperature=0.0, logit_bias={3: 2.0})]
    assert sample(rows).token_ids.tolist() == [7, 3]


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 3.5 / 50}])
def test_filters_take_equal_logits_in_the_order_of_token_ids(options: dict[str, Any]) -> None:
    logits = np.where(np.arange(VOCAB) % 2 == 1, 0.0, -np.inf)[:99]
    if "top_p" in options:
        logits = np.where(np.arange(VOCAB) < 50, 0.0, -np.inf)
    rows = [Row(logits, seed=seed, **options) for seed in range(300)]
    drawn = set(sample(rows).token_ids.tolist())
    assert drawn == ({1, 3, 5} if "top_k" in options else {0, 1, 2, 3})


def test_zeros_of_either_sign_are_equal() -> None:
    logits = np.full(VOCAB, -np.inf)
    logits[[2, 9, 30]] = [-0.0, 0.0, -0.0]
    rows = [Row(logits, seed=seed, top_k=2) for seed in range(100)]
    assert set(sample(rows).token_ids.tolist()) == {2, 9}


def test_a_tiny_temperature_is_greedy() -> None:
    rows = [Row(make_logits(i), temperature=1e-9, seed=i) for i in range(20)]
    assert sample(rows).token_ids.tolist() == [int(row.logits.argmax()) for row in rows]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_is_the_same_alone_and_in_any_batch_bit_for_bit(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([5, 97, 1031, 3000]))
    count = data.draw(st.integers(2, 12))
    rows = []
    for i in range(count):
        seed = data.draw(st.integers(0, 2**32))
        rng = np.random.default_rng(seed)
        rows.append(
            Row(
                rng.normal(0, rng.uniform(0.1, 10), vocab_size),
                prompt=rng.integers(0, vocab_size, 5).tolist(),
                output=rng.integers(0, vocab_size, 5).tolist(),
                seed=seed,
                stop_token_ids=[0, 3],
                temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0, 4.0]), label=f"temperature {i}"),
                top_k=data.draw(st.sampled_from([0, 1, 3, 1500])),
                top_p=data.draw(st.sampled_from([1.0, 0.3, 0.99])),
                min_p=data.draw(st.sampled_from([0.0, 0.1])),
                repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
                frequency_penalty=data.draw(st.sampled_from([0.0, 0.77])),
                presence_penalty=data.draw(st.sampled_from([0.0, 0.3])),
                logit_bias=data.draw(st.sampled_from([None, {1: 3.3}])),
                min_tokens=data.draw(st.sampled_from([0, 9])),
                logprobs=data.draw(st.sampled_from([None, 0, 4, 20])),
            )
        )
    together = sample(rows)
    for i, row in enumerate(rows):
        alone = sample([row])
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]


def test_min_tokens_holds_stop_ids_back_until_there_are_so_many() -> None:
    logits = np.zeros(VOCAB)
    logits[[4, 6]] = [9.0, 5.0]

    def row(num_output: int) -> Row:
        return Row(logits, output=[8] * num_output, stop_token_ids=[4], temperature=0.0, min_tokens=2)

    assert sample([row(0), row(1), row(2), row(3)]).token_ids.tolist() == [6, 6, 4, 4]


def test_presence_and_frequency_look_at_the_output_alone() -> None:
    logits = np.zeros(VOCAB)
    logits[[1, 2]] = [5.0, 4.5]
    options: list[dict[str, Any]] = [{"presence_penalty": 1.0}, {"frequency_penalty": 1.0}]
    in_prompt = [Row(logits, prompt=[1], temperature=0.0, **o) for o in options]
    in_output = [Row(logits, prompt=[3], output=[1], temperature=0.0, **o) for o in options]
    assert sample(in_prompt).token_ids.tolist() == [1, 1]
    assert sample(in_output).token_ids.tolist() == [2, 2]
    assert sample([Row(logits, prompt=[1], temperature=0.0, repetition_penalty=2.0)]).token_ids.tolist() == [2]


def test_stop_ids_beyond_the_vocabulary_are_nobodys_business() -> None:
    row = Row(make_logits(0), stop_token_ids=[VOCAB, 10 * VOCAB], temperature=0.0, min_tokens=3)
    assert sample([row]).token_ids.tolist() == [int(row.logits.argmax())]


def test_logprobs_are_the_raw_models() -> None:
    logits = make_logits(1)
    row = Row(logits, temperature=0.5, top_k=40, logit_bias={9: 4.0}, logprobs=5, presence_penalty=1.0, seed=3)
    output = sample([row, Row(logits, temperature=0.0)])
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    order = np.argsort(-logits, kind="stable")
    found = output.logprobs[0]
    assert found is not None and output.logprobs[1] is None
    assert found.token_id == output.token_ids[0]
    assert found.logprob == pytest.approx(expected[found.token_id], rel=1e-5)
    assert found.rank == int(np.flatnonzero(order == found.token_id)[0]) + 1
    assert found.top_token_ids == order[:5].tolist()
    assert found.top_logprobs == pytest.approx(expected[order[:5]], rel=1e-5)


def test_logprobs_of_equal_logits_share_a_rank_and_are_listed_by_id() -> None:
    logits = np.zeros(VOCAB)
    (found,) = sample([Row(logits, seed=4, logprobs=3)]).logprobs
    assert found is not None
    assert (found.rank, found.top_token_ids) == (1, [0, 1, 2])
    (found,) = sample([Row(logits, temperature=0.0, logprobs=0)]).logprobs
    assert found is not None and found.top_token_ids == [] and found.logprob == pytest.approx(-math.log(VOCAB))


@pytest.mark.parametrize(
    ("spoil", "reason"), [("nan", "NaN"), ("all -inf", "no token is left"), ("+inf", "overflowed to infinity")]
)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.9, "logprobs": 2, "presence_penalty": 1.0}])
def test_a_spoilt_row_fails_alone(spoil: str, reason: str, options: dict[str, Any]) -> None:
    rows = [Row(make_logits(i), seed=i, **options) for i in range(3)]
    expected = sample(rows)
    bad = rows[1].logits.copy()
    bad[5 if spoil != "all -inf" else slice(None)] = {"nan": np.nan, "all -inf": -np.inf, "+inf": np.inf}[spoil]
    output = sample([rows[0], Row(bad, **options), rows[2]])
    assert list(output.failed) == [1] and reason in output.failed[1]
    assert expected.failed == {}
    for i in (0, 2):
        assert output.token_ids[i] == expected.token_ids[i] and output.logprobs[i] == expected.logprobs[i]
    assert output.logprobs[1] is None


def test_forbidding_every_token_fails_that_row() -> None:
    row = Row(make_logits(0, 4), stop_token_ids=[0, 1, 2, 3], temperature=0.0, min_tokens=1)
    assert "no token is left" in sample([row]).failed[0]


def test_the_logits_are_left_as_they_are() -> None:
    rows = make_rows(OPTIONS[-1], 4)
    logits = torch.from_numpy(np.stack([row.logits for row in rows]))
    before = logits.clone()
    Sampler(torch.device("cpu"))(logits, make_metadata(rows))
    assert torch.equal(logits, before)
