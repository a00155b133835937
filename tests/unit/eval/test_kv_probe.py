"""The KV probe on a tiny model: identity for the full cache, sensible order of the others, the command's output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from servd.attention.kv_dtype import KVCacheDtype
from servd.cli import main
from servd.eval.kv_probe import ProbeResult, probe
from servd.eval.paged_text import PagedTexts, hidden_states
from servd.eval.text import python_help, read_tokens
from servd.models.base import Model
from servd.models.loader import load_model
from tests.unit.worker.tiny_llama import MAX_POSITIONS, VOCAB_SIZE, write_tiny_llama

TEXT = [(i * i + 3 * i) % VOCAB_SIZE for i in range(150)]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(write_tiny_llama(tmp_path), dtype="float32", device="cpu")


def run(model: Model, **choices: KVCacheDtype) -> dict[str, ProbeResult]:
    # Room for the greedy answers: the tiny model's positions end before theirs would.
    results = probe(model, TEXT, choices, context=60, kv_memory=10_000_000, max_model_len=100)
    return {result.kv_cache_dtype: result for result in results}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servd.eval.kv_probe.GREEDY_TOKENS", MAX_POSITIONS - 64)


def test_the_full_cache_is_equal_to_itself(model: Model) -> None:
    result = run(model, same=KVCacheDtype(key="float32", value="float32"))["same"]
    assert (result.kl_divergence, result.top1_equal, result.greedy_equal) == (0.0, 1.0, 1.0)
    assert result.perplexity_change == 0 and result.capacity == 1


def test_fewer_bits_hold_more_and_cost_more(model: Model) -> None:
    found = run(model, int8=KVCacheDtype("int8", "int8"), int4=KVCacheDtype("int4", "int4"))
    assert found["auto"].capacity == 1 < found["int8"].capacity < found["int4"].capacity
    assert 0 < found["int8"].kl_divergence < found["int4"].kl_divergence
    assert found["int8"].requests_that_fit > found["auto"].requests_that_fit


def test_skipped_layers_are_counted(model: Model) -> None:
    found = run(model, all=KVCacheDtype("int8", "int8"), half=KVCacheDtype("int8", "int8", skip_layers=frozenset([1])))
    assert found["half"].bytes_per_token == (found["all"].bytes_per_token + found["auto"].bytes_per_token) / 2


def test_perplexity_is_that_of_the_logits(model: Model) -> None:
    texts = PagedTexts(model, KVCacheDtype(), 1, 60)
    logits = model.compute_logits(texts.extend([TEXT[:60]])).double()
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(TEXT[1:60]))
    (result,) = probe(model, TEXT[:60], {}, context=60, kv_memory=1, max_model_len=1)
    assert result.perplexity == pytest.approx(float(loss.exp()), rel=1e-9)


def test_contexts_do_not_see_each_other(model: Model) -> None:
    whole = hidden_states(model, KVCacheDtype(), TEXT[:120], 60)
    assert torch.equal(whole[60:], hidden_states(model, KVCacheDtype(), TEXT[60:120], 60))


def test_greedy_answers_do_not_depend_on_company(model: Model) -> None:
    prompts = [TEXT[:5], TEXT[30:50]]
    together = PagedTexts(model, KVCacheDtype(), 2, 60).continue_greedily(prompts, 20)
    alone = [PagedTexts(model, KVCacheDtype(), 1, 60).continue_greedily([prompt], 20)[0] for prompt in prompts]
    assert together == alone


class Bytes:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


def test_text_comes_from_a_file_or_from_python(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("abc" * 100)
    assert bytes(read_tokens(Bytes(), path, 7)) == b"abcabca"
    assert bytes(read_tokens(Bytes(), None, 50)).decode() == python_help()[:50]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-cache-dtype", "int3"], "--kv-cache-dtype is 'int3'; allowed: auto"),
        (["--kv-cache-dtype", "q=int8"], "allowed: one type, or k=TYPE,v=TYPE"),
        (["--kv-cache-skip-layers", "3-1"], "--kv-cache-skip-layers is '3-1'; allowed: numbers and ranges"),
        (["--tokens", "5"], "--tokens is 5; allowed: at least 128"),
        (["--json", "/nowhere/out.json"], "--json is /nowhere/out.json; allowed: a file in a folder that exists"),
        (["--plot", "x.gif"], "--plot is x.gif; allowed: a file that ends in .png"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_loaded(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv-probe", "/nowhere", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_table_writes_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.unit.eval.tiny_tokenizer import write_byte_tokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_llama(folder)
    write_byte_tokenizer(folder)
    out = tmp_path / "out.json"
    picture = tmp_path / "plot.png"
    flags = ["--tokens", "128", "--context", "64", "--json", str(out), "--plot", str(picture)]
    flags += ["--kv-cache-dtype", "k=int8,v=int4"]
    assert main(["kv-probe", str(folder), "--dtype", "float32", *flags]) == 0
    shown = capsys.readouterr().out
    assert "k=int8,v=int4" in shown and "perplexity" in shown
    rows = json.loads(out.read_text())
    assert [row["kv_cache_dtype"] for row in rows] == ["auto", "k=int8,v=int4"]
    assert rows[1]["capacity"] > 2
    assert picture.read_bytes().startswith(b"\x89PNG")
