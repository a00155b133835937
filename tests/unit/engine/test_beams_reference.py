"""Beam search over a tiny Llama in float32 finds what `transformers` finds, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from servd import LLM, SamplingParams
from servd.engine.llm import Generation
from servd.errors import InvalidRequestError
from tests.unit.worker.tiny_llama import VOCAB_SIZE, write_tiny_llama

STOPS = tuple(range(0, VOCAB_SIZE, 15))  # often among the likeliest: searches end early, and at different lengths
PROMPTS = [[5, 6, 7], [250, 3], list(range(40, 61)), [9] * 16]
SETTINGS: dict[str, Any] = {"device": "cpu", "threads": 1, "max_num_seqs": 16, "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_llama(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {f"<{i}>": i for i in range(len(alphabet), VOCAB_SIZE)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, block_size=4, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def search(prompt: list[int], params: SamplingParams) -> list[tuple[list[int], float]]:
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            num_beams=params.num_sequences,
            num_return_sequences=params.n,
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.min_tokens or None,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=list(params.stop_token_ids) or None,
            pad_token_id=VOCAB_SIZE - 1,
            return_dict_in_generate=True,
            output_scores=True,
        )
        answers = [[t for t in ids[len(prompt) :] if t != VOCAB_SIZE - 1] for ids in found.sequences.tolist()]
        return list(zip(answers, found.sequences_scores.tolist(), strict=True))

    return search


def searched(generation: Generation) -> list[list[int]]:
    return [answer.token_ids for answer in generation.answers]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    ("width", "n", "length_penalty", "max_tokens", "stops", "min_tokens"),
    [
        (2, 1, 1.0, 12, STOPS, 0), (4, 4, 1.0, 20, STOPS, 0), (4, 2, 0.0, 16, STOPS, 0),
        (5, 5, 2.5, 16, STOPS, 0), (3, 3, -1.0, 16, STOPS, 0), (8, 3, 1.0, 9, (), 0), (4, 4, 1.0, 12, STOPS, 5),
    ],
)  # fmt: skip
def test_the_sequences_are_those_of_transformers(
    llm, reference, early_stopping, width, n, length_penalty, max_tokens, stops, min_tokens
):
    params = SamplingParams(
        n=n, best_of=width, use_beam_search=True, length_penalty=length_penalty, early_stopping=early_stopping,
        max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stops, logprobs=0,
    )  # fmt: skip
    together = llm.generate(PROMPTS, params)
    for prompt, generation in zip(PROMPTS, together, strict=True):
        expected = reference(prompt, params)
        assert searched(generation) == [ids for ids, _ in expected]
        for answer, (ids, score) in zip(generation.answers, expected, strict=True):
            logprob = sum(entry.logprob for entry in answer.logprobs)
            assert logprob / len(ids) ** length_penalty == pytest.approx(score, abs=1e-3)
            assert answer.finish_reason.value == ("stop" if ids[-1] in stops else "length")


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 1}, {"block_size": 16}, {"block_size": 4, "max_num_batched_tokens": 5, "max_num_seqs": 5},
        {"block_size": 4, "enable_prefix_caching": False},
        {"block_size": 4, "kv_cache_memory": 15 * 2048, "max_model_len": 48},
        {"block_size": 4, "max_num_seqs": 4},
    ],
)  # fmt: skip
def test_neither_the_batch_nor_preemption_nor_chunks_change_a_search(folder, llm, settings):
    search = SamplingParams(n=4, use_beam_search=True, max_tokens=20, stop_token_ids=STOPS)
    greedy = SamplingParams(temperature=0.0, max_tokens=20)
    params = [search, greedy, search, search]
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    with LLM(folder, **(SETTINGS | settings)) as other:
        together = other.generate(PROMPTS, params)
        assert [searched(one) for one in together] == [searched(one) for one in alone]
        other.engine.core.scheduler.cache.check_integrity()
        stats = other.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        if "kv_cache_memory" in settings:
            assert other.engine.core.scheduler.num_preemptions > 0


def test_a_search_computes_each_beam_step_with_one_token(llm):
    params = SamplingParams(n=4, use_beam_search=True, max_tokens=10, ignore_eos=True)
    before = max((step.step_id for step in llm.engine.core.step_log), default=-1)
    llm.generate([list(range(100, 130))], params)
    steps = [step for step in llm.engine.core.step_log if step.step_id > before]
    assert [(step.num_reqs, step.num_prefill_tokens) for step in steps] == [(1, 30)] + [(4, 0)] * 9


def test_logprobs_and_prompt_logprobs_of_a_search(llm):
    params = SamplingParams(
        n=2, best_of=3, use_beam_search=True, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True
    )
    plain = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    generation = llm.generate([PROMPTS[2]], params)[0]
    for answer in generation.answers:
        assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
        for entry in answer.logprobs:
            assert len(entry.top_token_ids) == 2
            if entry.rank <= 2:
                assert entry.top_token_ids[entry.rank - 1] == entry.token_id
    assert generation.prompt_logprobs == llm.generate([PROMPTS[2]], plain)[0].prompt_logprobs


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": 0.5}, "temperature"), ({"top_p": 0.9}, "top_p"), ({"stop": ("x",)}, "stop"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"), ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"best_of": 3}, "best_of"), ({"max_tokens": 0}, "max_tokens"), ({"length_penalty": float("nan")},
        "length_penalty"), ({"early_stopping": "always"}, "early_stopping"), ({"early_stopping": 1}, "early_stopping"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty"), ({"use_beam_search": 1},
        "use_beam_search"), ({"n": 17}, "n"), ({"best_of": 17}, "best_of"),
    ],
)  # fmt: skip
def test_what_a_search_cannot_honour_is_refused_by_name(llm, change, field):
    settings: dict[str, Any] = {"n": 4, "use_beam_search": True} | change
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate([[1, 2]], SamplingParams(**settings))
    assert caught.value.param == field
