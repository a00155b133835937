"""`servd eval`: scoring, the statistics of the verdict, perplexity of the logits, the command's output."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from servd.attention.kv_dtype import KVCacheDtype
from servd.cli import main
from servd.config import EngineConfig
from servd.eval.paged_text import PagedTexts
from servd.eval.quality import Exam, Quality, compare, evaluate_model, reference_config
from servd.eval.questions import Question, chance_of_difference, questions, score
from servd.models.loader import load_model
from tests.unit.eval.tiny_tokenizer import write_byte_tokenizer
from tests.unit.worker.tiny_llama import VOCAB_SIZE, write_tiny_llama

TEXT = [(i * i + 3 * i) % VOCAB_SIZE for i in range(150)]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servd.eval.quality.MAX_ANSWER_TOKENS", 4)  # the tiny model's positions end early


def test_there_are_fifty_different_questions() -> None:
    assert len({question.prompt for question in questions()}) == 50


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is 42.", True),
        ("**42**", True),
        ("Forty-two", True),
        ("142", False),
        ("42.5", False),
        ("4,42", False),
        ("about 420", False),
        ("", False),
    ],
)
def test_an_answer_holds_the_accepted_text_as_a_whole(answer: str, right: bool) -> None:
    assert Question("sum", "6 x 7?", ("42", "forty-two")).is_right(answer) is right


def test_score_judges_each_question_by_its_own_answers() -> None:
    answers = [question.accept[0] for question in questions()]
    assert all(score(answers))
    assert not any(score([""] * 50))


@pytest.mark.parametrize(
    ("only_first", "only_second", "chance"), [(0, 0, 1.0), (3, 3, 1.0), (6, 0, 2 / 64), (1, 6, 16 / 128), (0, 1, 1.0)]
)
def test_chance_is_the_two_sided_binomial_of_the_differing_pairs(
    only_first: int, only_second: int, chance: float
) -> None:
    first = [True] * only_first + [False] * only_second + [True, False]
    second = [False] * only_first + [True] * only_second + [True, False]
    assert chance_of_difference(first, second) == chance


def quality(loss: float, num_right: int) -> Quality:
    losses = [loss + 0.1 * (i % 3) for i in range(9)]
    right = [True] * num_right + [False] * (50 - num_right)
    return Quality(math.exp(sum(losses) / 9), losses, [str(i) for i in range(50)], right)


@pytest.mark.parametrize(
    ("loss", "num_right", "faithful"),
    [(3.0, 35, True), (3.009, 30, True), (3.011, 35, False), (3.0, 29, False), (2.98, 35, False)],
)
def test_faithful_needs_both_the_perplexity_and_the_answers(loss: float, num_right: int, faithful: bool) -> None:
    comparison = compare(quality(loss, num_right), quality(3.0, 35))
    assert comparison.is_faithful is faithful
    assert comparison.perplexity_change == pytest.approx(math.exp(loss - 3) - 1, abs=1e-6)
    assert comparison.perplexity_error == pytest.approx(0, abs=1e-5)  # every block changed alike
    assert (comparison.only_reference_right, comparison.only_this_right) == (35 - num_right, 0)


def test_perplexity_is_that_of_the_logits_and_answers_end_at_the_end_token(tmp_path: Path) -> None:
    model = load_model(write_tiny_llama(tmp_path), dtype="float32", device="cpu")
    texts = PagedTexts(model, KVCacheDtype(), 1, 60)
    logits = model.compute_logits(texts.extend([TEXT[:60]])).double()
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(TEXT[1:60]))
    prompts = [TEXT[i : i + 5 + i % 3] for i in range(50)]
    plain = evaluate_model(model, KVCacheDtype(), Exam(TEXT[:60], 60, prompts, str))
    assert plain.perplexity == pytest.approx(float(loss.exp()), rel=1e-9)
    greedy = PagedTexts(model, KVCacheDtype(), 1, 60).continue_greedily(prompts[:1], 4)[0]
    assert plain.answers[0] == str(greedy)
    end = frozenset([greedy[2]])
    ended = evaluate_model(model, KVCacheDtype(), Exam(TEXT[:60], 60, prompts, str, end))
    assert ended.answers[0] == str(greedy[: greedy.index(greedy[2])])


def test_the_reference_is_exact_whatever_was_asked() -> None:
    config = EngineConfig.from_flat(dtype="bfloat16", kv_cache_dtype="int4", block_size=32)
    reference = reference_config(config)
    assert reference.model.dtype == "float32"
    assert (reference.cache.kv_cache_dtype, reference.cache.block_size) == ("auto", 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_llama(folder)
    write_byte_tokenizer(folder)
    return folder


FLAGS = ["--tokens", "128", "--context", "64"]


def test_the_command_prints_a_verdict_and_writes_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out.json"
    assert main(["eval", str(folder), "--dtype", "float32", *FLAGS, "--json", str(out), "--strict"]) == 0
    shown = capsys.readouterr().out
    assert "faithful: perplexity +0.00%" in shown and "50/50" in shown
    content = json.loads(out.read_text())
    assert content["comparison"]["faithful"] is True
    assert content["quality"] == content["reference"]


def test_an_earlier_run_serves_as_reference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folder / "first.json", folder / "second.json"
    assert main(["eval", str(folder), *FLAGS, "--json", str(first)]) == 0
    rough = ["--kv-cache-dtype", "int4", "--against", str(first), "--strict", "--json", str(second)]
    assert main(["eval", str(folder), *FLAGS, *rough]) == 1  # random weights: four bits change every answer
    assert "NOT faithful" in capsys.readouterr().out
    assert json.loads(second.read_text())["reference"] == json.loads(first.read_text())["reference"]
    assert main(["eval", str(folder), "--tokens", "130", "--against", str(first)]) == 2
    assert "allowed: this run's text and questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "5"], "--tokens is 5; allowed: at least 128"),
        (["--json", "/nowhere/out.json"], "--json is /nowhere/out.json; allowed: a file in a folder that exists"),
        (["--context", "1"], "--context is 1; allowed: at least 2"),
        (["--strict", "--against", "none"], "allowed: float32 or a FILE"),
        (["--kv-cache-dtype", "int3"], "'int3'"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_loaded(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "/nowhere", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_a_reference_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = folder / "bad.json"
    bad.write_text("{}")
    assert main(["eval", str(folder), *FLAGS, "--against", str(bad)]) == 2
    assert "allowed: float32, none, or a file that `servd eval --json` wrote" in capsys.readouterr().err
