"""Requests from a seed, a trace or a file: lengths, shared prefixes, fresh beginnings, cuts."""

from __future__ import annotations

import asyncio
import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servd.benchmark.arrivals import arrive_at_rate
from servd.benchmark.corpus import Corpus
from servd.benchmark.dataset import dataset_requests, read_dataset
from servd.benchmark.requests import NUM_FRESH, BenchRequest, clip_to_context, data_hash, freshen
from servd.benchmark.trace import BLOCK_TOKENS, read_trace, trace_requests
from servd.benchmark.workload import Lengths, WorkloadSpec, make_workload
from servd.errors import ConfigError

IDS = Corpus.of_ids(range(1000, 9000))
TEXT = Corpus.of_text(" ".join(f"word{i}" for i in range(500)))


def test_the_same_seed_gives_the_same_requests_and_another_gives_others():
    first, again, other = (make_workload(IDS, WorkloadSpec(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert data_hash(first) == data_hash(again) != data_hash(other)


def test_chat_lengths_are_log_normal_within_their_limits():
    requests = make_workload(IDS, WorkloadSpec(num_requests=2000))
    prompts = [len(request.prompt) for request in requests]
    outputs = [request.output_tokens for request in requests]
    assert prompts == [request.num_prompt_tokens for request in requests]
    assert (min(prompts), max(prompts), min(outputs), max(outputs)) == (32, 512, 32, 256)
    assert 120 < statistics.median(prompts) < 136
    assert 90 < statistics.median(outputs) < 102


def test_shared_prefixes_are_taken_in_turn_and_survive_freshening():
    spec = WorkloadSpec(num_requests=6, prefix_tokens=100, num_prefixes=2, input_tokens=Lengths.parse("10", "-"))
    for requests in (make_workload(IDS, spec), freshen(make_workload(IDS, spec), 7)):
        prefixes = [request.prompt[:100] for request in requests]
        assert prefixes[0] == prefixes[2] == prefixes[4] != prefixes[1] == prefixes[3] == prefixes[5]
        assert len({request.prompt for request in requests}) == 6
        assert {len(request.prompt) for request in requests} == {110}


@pytest.mark.parametrize("corpus", [IDS, TEXT], ids=["ids", "text"])
def test_fresh_requests_begin_differently_by_salt_alone_and_are_otherwise_the_same(corpus):
    requests = make_workload(corpus, WorkloadSpec(num_requests=20))
    fresh = [freshen(requests, salt) for salt in (1, 1, 2)]
    assert fresh[0] == fresh[1]
    for old, one, two in zip(requests, fresh[0], fresh[2], strict=True):
        old_pieces, one_pieces, two_pieces = (
            r.prompt.split(" ") if isinstance(r.prompt, str) else r.prompt for r in (old, one, two)
        )
        assert one_pieces[:NUM_FRESH] != two_pieces[:NUM_FRESH]
        assert old_pieces[NUM_FRESH:] == one_pieces[NUM_FRESH:] == two_pieces[NUM_FRESH:]
        assert len(one_pieces) == len(old_pieces)


def test_a_prompt_shorter_than_what_is_replaced_keeps_its_length():
    (fresh,) = freshen([BenchRequest("a", (5,), 1, 1)], 3)
    assert len(fresh.prompt) == 1
    assert freshen([BenchRequest("a", "", 0, 1)], 3)[0].prompt == ""


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(2, 4096))
def test_what_is_clipped_fits_the_context_and_what_fits_is_left_alone(num_prompt_tokens, output_tokens, limit):
    request = BenchRequest("a", tuple(range(num_prompt_tokens)), num_prompt_tokens, output_tokens)
    (clipped,), count = clip_to_context([request], limit)
    assert len(clipped.prompt) == clipped.num_prompt_tokens >= 1
    assert clipped.output_tokens >= 1
    assert clipped.num_prompt_tokens + clipped.output_tokens <= limit
    assert clipped.prompt == request.prompt[: len(clipped.prompt)]
    fits = num_prompt_tokens + output_tokens <= limit
    assert (count == 0) == fits == (clipped == request)


def test_text_is_clipped_by_words():
    (request,) = make_workload(TEXT, WorkloadSpec(num_requests=1, input_tokens=Lengths.parse("400", "-")))
    (clipped,), count = clip_to_context([request], 100)
    assert count == 1
    assert request.prompt.startswith(clipped.prompt)
    assert len(clipped.prompt) < len(request.prompt) / 3


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "5:-1", "nan", "5:x", "1e99"])
def test_wrong_lengths_are_refused_by_flag(text):
    with pytest.raises(ConfigError, match="--input-tokens is"):
        Lengths.parse(text, "--input-tokens")


def test_arrivals_have_the_rate_and_the_burstiness_asked_for():
    requests = [BenchRequest(str(i), (1,), 1, 1) for i in range(4000)]
    spread = {}
    for burstiness in (0.25, 1.0, 4.0):
        arrivals = [r.arrival_s for r in arrive_at_rate(requests, 5.0, burstiness=burstiness, seed=3)]
        assert arrivals[0] == 0
        assert arrivals == sorted(arrivals)
        gaps = [b - a for a, b in zip(arrivals, arrivals[1:], strict=False)]
        assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.1)
        spread[burstiness] = statistics.pstdev(gaps) / statistics.mean(gaps)
    assert spread[0.25] == pytest.approx(2.0, rel=0.15)  # of a gamma distribution, 1 / sqrt(shape)
    assert spread[1.0] == pytest.approx(1.0, rel=0.15)
    assert spread[4.0] == pytest.approx(0.5, rel=0.15)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(
    ["2023-11-16 18:17:03.9799600,480,10", "2023-11-16 18:17:04.9799600,31,8", "2023-11-16 18:18:03.9799600,7000,14"]
)
MOONCAKE = "\n".join(
    json.dumps({"timestamp": at, "input_length": length, "output_length": 6, "hash_ids": ids})
    for at, length, ids in [(27000, 1100, [7, 8, 9]), (30000, 1030, [7, 8, 20]), (30500, 600, [30, 8])]
)


def test_azures_trace_is_known_by_its_content(tmp_path):
    (tmp_path / "trace").write_text(AZURE)
    requests, num_clipped = trace_requests(IDS, read_trace(tmp_path / "trace"), limit=2048, speed=2.0)
    assert [r.arrival_s for r in requests] == pytest.approx([0, 0.5, 30])
    assert [(len(r.prompt), r.output_tokens) for r in requests] == [(480, 10), (31, 8), (2034, 14)]
    assert num_clipped == 1


def test_mooncakes_trace_shares_what_its_hash_ids_share(tmp_path):
    (tmp_path / "trace").write_text(MOONCAKE + "\n")
    requests, num_clipped = trace_requests(IDS, read_trace(tmp_path / "trace"))
    assert num_clipped == 0
    assert [r.arrival_s for r in requests] == [0, 3, 3.5]
    assert [len(r.prompt) for r in requests] == [1100, 1030, 600]
    for some in (requests, freshen(requests, 5)):
        a, b, c = (request.prompt for request in some)
        assert a[: 2 * BLOCK_TOKENS] == b[: 2 * BLOCK_TOKENS]
        assert a[2 * BLOCK_TOKENS : 1030] != b[2 * BLOCK_TOKENS :]
        assert c[:BLOCK_TOKENS] != a[:BLOCK_TOKENS]
        assert c[BLOCK_TOKENS:] == a[BLOCK_TOKENS:600]


def test_a_trace_may_be_cut_short(tmp_path):
    (tmp_path / "trace").write_text(MOONCAKE)
    assert len(read_trace(tmp_path / "trace", 2)) == 2


def test_a_traces_lines_may_stand_in_any_order(tmp_path):
    (tmp_path / "trace").write_text("\n".join(reversed(MOONCAKE.splitlines())))
    assert [arrival.at_s for arrival in read_trace(tmp_path / "trace")] == [3.5, 3, 0]


@pytest.mark.parametrize(
    "content",
    ["", "a,b\n1,2\n", '{"timestamp": 1}\n', "TIMESTAMP,ContextTokens\nx,1\n", "{", f'["{"x" * 200_000}"]'],
    ids=lambda content: content[:20],
)
def test_what_is_no_trace_is_told_with_the_known_formats(tmp_path, content):
    (tmp_path / "trace").write_text(content)
    with pytest.raises(ConfigError, match="--trace .*Azure.*Mooncake"):
        read_trace(tmp_path / "trace")


SHAREGPT = [
    {"id": "x", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That, of course."}]},
    {"id": "y", "conversations": [{"from": "gpt", "value": "I begin."}]},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a picture"}}]}]},
    {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": None, "tool_calls": []}]},
]
LINES = [{"prompt": "How", "output_tokens": 5}, {"prompt_token_ids": [4, 5, 6], "prompt": "text", "output_tokens": 7}]


async def byte_tokens(texts):
    return [list(text.encode()) for text in texts]


def test_conversations_become_their_first_question_with_the_answers_length(tmp_path):
    (tmp_path / "file").write_text(json.dumps(SHAREGPT))
    exchanges = read_dataset(tmp_path / "file")
    requests = asyncio.run(dataset_requests(exchanges, 10, tokenize=byte_tokens))
    assert [r.prompt for r in requests] == [tuple(b"What?"), tuple(b"Who?"), tuple(b"Where?")]
    assert requests[0].output_tokens == len("That, of course.")
    assert all(32 <= request.output_tokens <= 256 for request in requests[1:])  # the file does not tell
    as_text = asyncio.run(dataset_requests(exchanges, 10, as_ids=False))
    assert [r.prompt for r in as_text] == ["What?", "Who?", "Where?"]
    assert as_text[0].output_tokens == 4


def test_json_lines_may_say_their_lengths_and_ids(tmp_path):
    (tmp_path / "file").write_text("\n".join(map(json.dumps, LINES)))
    requests = asyncio.run(dataset_requests(read_dataset(tmp_path / "file"), 10, tokenize=byte_tokens))
    assert [(r.prompt, r.num_prompt_tokens, r.output_tokens) for r in requests] == [
        (tuple(b"How"), 3, 5), ((4, 5, 6), 3, 7),
    ]  # fmt: skip


def test_fewer_requests_are_drawn_by_seed_in_the_files_order(tmp_path):
    (tmp_path / "file").write_text("\n".join(json.dumps({"prompt": f"{i:03d}", "output_tokens": 1}) for i in range(99)))
    exchanges = read_dataset(tmp_path / "file")
    drawn = [[r.prompt for r in asyncio.run(dataset_requests(exchanges, 9, seed=s, as_ids=False))] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert len(drawn[0]) == 9
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "[1]", '[{"a": 1}]', "nonsense", '{"prompt": "x", "output_tokens": 0}', '{"prompt": ["x", "y"]}',
        '{"prompt_token_ids": "12"}', '{"conversations": [{"value": "x"}]}',
    ],
)  # fmt: skip
def test_what_is_no_dataset_is_told_with_the_known_formats(tmp_path, content):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ConfigError, match="--dataset .*conversations"):
        read_dataset(tmp_path / "file")
