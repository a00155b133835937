"""The starter model writes what grammars ask for, at temperature 1, and to the same bits whatever runs beside it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from jsonschema import Draft202012Validator

from servd import LLM, SamplingParams
from servd.engine import guidance
from servd.errors import InvalidRequestError, RequestFailedError
from servd.request import FinishReason
from tests.e2e.schemas import SCHEMAS
from tests.unit.engine.test_guidance import REFUSED

SETTINGS = {"kv_cache_memory": 1 << 28, "max_model_len": 2048}
PROMPT = "Write an example of the JSON document.\n"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS) as llm:
        yield llm


def params(seed: int, **options) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 800, **options})


def test_sixty_schemas_give_valid_json(llm):
    assert len(SCHEMAS) == 60
    for schema in SCHEMAS:
        Draft202012Validator.check_schema(schema)
    # The ends of recursions and of digits, which the model is slow to choose by itself.
    ends = {"null": 8.0, "]": 8.0, "]}": 8.0, "[]": 8.0, "[]}": 8.0, '"': 3.0}
    bias = {llm.engine.tokenizer.encode(text)[0]: value for text, value in ends.items()}
    work = [
        params(i, guidance=guidance.from_json_schema(schema), logit_bias=bias) for i, schema in enumerate(SCHEMAS)
    ]
    for schema, generation in zip(SCHEMAS, llm.generate([PROMPT] * len(work), work), strict=True):
        answer = generation.answers[0]
        assert answer.finish_reason is FinishReason.STOP, f"{schema}: {answer.text}"
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        errors = [error.message for error in validator.iter_errors(json.loads(answer.text))]
        assert not errors, f"{schema}: {answer.text}: {errors}"


def test_bits_do_not_depend_on_the_batch_nor_on_guesses_nor_on_restarts_of_a_request(llm):
    mixed = [
        params(1, max_tokens=200, guidance=guidance.from_json_schema(SCHEMAS[40])),
        params(2, max_tokens=200, guidance=guidance.from_regex(r"\d{3}-\d{4} (north|south)")),
        params(3, max_tokens=100, bad_words=("the", " a", "."), ignore_eos=True),
        params(4, max_tokens=20, allowed_token_ids=tuple(range(2000, 2300)), ignore_eos=True),
        params(5, max_tokens=100, ignore_eos=True),
        params(6, max_tokens=200, guidance=guidance.from_json_schema(SCHEMAS[56]), n=3),
    ]
    together = llm.generate([PROMPT] * len(mixed), mixed)
    # Few blocks and no guesses: answers take blocks from each other and start again.
    few = {"max_model_len": 256, "kv_cache_memory": 18 * 16 * 23040, "max_num_seqs": 4}
    with LLM(**few, num_speculative_tokens=0) as small:
        again = small.generate([PROMPT] * len(mixed), mixed)
        assert small.engine.core.scheduler.num_preemptions > 0
    for one, generation, other in zip(mixed, together, again, strict=True):
        (by_itself,) = llm.generate([PROMPT], [one])
        for answer, second, third in zip(generation.answers, other.answers, by_itself.answers, strict=True):
            assert answer.token_ids == second.token_ids == third.token_ids
    assert re.fullmatch(r"\d{3}-\d{4} (north|south)", together[1].text)
    assert not any(word in together[2].text for word in ("the", " a", "."))
    assert set(together[3].answers[0].token_ids) <= set(range(2000, 2300))
    assert len({answer.text for answer in together[5].answers}) > 1


def test_a_killed_worker_changes_no_token_of_a_constrained_answer(llm):
    work = [
        params(1, max_tokens=300, guidance=guidance.from_json_schema({"type": "object"}), bad_words=("e",)),
        params(2, guidance=guidance.from_regex("([a-z]{4} ){40}[a-z]{4}")),
    ]
    expected = llm.generate([PROMPT] * 2, work)
    with LLM(**SETTINGS, executor="multiproc") as other, ThreadPoolExecutor(1) as thread:
        answers = thread.submit(other.generate, [PROMPT] * 2, work)
        while len(other.engine.core.step_log) < 20:
            assert not answers.done()
        os.kill(other.engine.executor.pids[0], signal.SIGKILL)
        for one, two in zip(expected, answers.result(), strict=True):
            assert one.answers[0].token_ids == two.answers[0].token_ids
        assert other.engine.metrics.worker_restarts._value.get() == 1


def test_hostile_schemas_are_refused_while_others_get_their_tokens(llm):
    plain = [params(i, max_tokens=150, ignore_eos=True) for i in range(8)]
    expected = llm.generate([PROMPT] * 8, plain)
    with ThreadPoolExecutor(1) as thread:
        beside = thread.submit(llm.generate, [PROMPT] * 8, plain)
        for name, schema in REFUSED.items():
            began = time.monotonic()
            with pytest.raises(InvalidRequestError) as caught:
                llm.generate(PROMPT, params(0, guidance=guidance.from_json_schema(schema)))
            assert caught.value.param == "guidance" and time.monotonic() - began < 2, name  # FAULTS rows 19 and 20
        for one, two in zip(expected, beside.result(), strict=True):
            assert one.answers[0].token_ids == two.answers[0].token_ids


def test_a_grammar_that_meets_a_limit_fails_alone_and_the_others_keep_their_bits(llm):
    ambiguous = guidance.from_lark('start: a\na: a a a a | b | c\nb: a b | "x"\nc: a c | "x" |')
    good = params(1, guidance=guidance.from_json_schema(SCHEMAS[31]))
    (expected,) = llm.generate([PROMPT], [good])
    with ThreadPoolExecutor(1) as thread:
        beside = thread.submit(llm.generate, [PROMPT], [good])
        with pytest.raises(RequestFailedError, match="grammar"):
            llm.generate(PROMPT, params(2, guidance=ambiguous, min_tokens=500))
        assert beside.result()[0].answers[0].token_ids == expected.answers[0].token_ids
