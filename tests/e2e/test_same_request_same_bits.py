"""A request's tokens and log-probabilities do not depend on what else happens: the same bits, not nearly the same."""

import pytest

from servd import LLM, SamplingParams
from tests.e2e.prompts import PROMPTS

SETTINGS = {"kv_cache_memory": 1 << 28, "max_model_len": 2048, "max_num_seqs": 32}


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=seed, max_tokens=40, ignore_eos=True, logprobs=1)


def bits(generations) -> list[list[tuple]]:
    """Every token with the exact value of its log-probability."""
    return [[(entry.token_id, entry.logprob) for entry in one.answers[0].logprobs] for one in generations]


CHOSEN = [0, 4, 7, 9, 15]  # English, code, Chinese, emoji, long


# Compute dtype, weight format, KV storage, and the bytes of a token's keys and values.
MODELS = {
    "float32": ("float32", "none", "auto", 46080),
    "bfloat16": ("bfloat16", "none", "auto", 23040),
    "stored": ("bfloat16", "stored", "auto", 23040),
    "w8a8": ("bfloat16", "w8a8", "auto", 23040),
    "int4": ("bfloat16", "none", "int4", 7200),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    dtype, quantization, kv_cache_dtype, _ = MODELS[request.param]
    return {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}


@pytest.fixture(scope="module")
def alone(model):
    """Each chosen prompt by itself on an engine with no prefix cache, which guesses nothing ahead."""
    with LLM(**model, enable_prefix_caching=False, num_speculative_tokens=0, **SETTINGS) as llm:
        return [bits(llm.generate(PROMPTS[i], sampled(i)))[0] for i in CHOSEN]


def test_among_31_others(model, alone):
    with LLM(**model, **SETTINGS) as llm:
        others = [(PROMPTS[i % 15] + " And then" * (i // 15), sampled(100 + i)) for i in range(32 - len(CHOSEN))]
        work = [(PROMPTS[i], sampled(i)) for i in CHOSEN]
        mixed = others[:13] + work[:3] + others[13:] + work[3:]
        results = bits(llm.generate([prompt for prompt, _ in mixed], [params for _, params in mixed]))
    assert results[13:16] + results[-2:] == alone


def test_with_prompts_in_chunks_of_64(model, alone):
    with LLM(**model, max_num_batched_tokens=64, **SETTINGS) as llm:
        assert bits(llm.generate([PROMPTS[i] for i in CHOSEN], [sampled(i) for i in CHOSEN])) == alone


def test_with_prefix_cache_hits(model, alone):
    with LLM(**model, **SETTINGS) as llm:
        llm.generate([PROMPTS[i] for i in CHOSEN], SamplingParams(max_tokens=1))
        again = llm.generate([PROMPTS[i] for i in CHOSEN], [sampled(i) for i in CHOSEN])
    assert again[-1].num_cached_tokens > 1000
    assert bits(again) == alone


def test_after_a_forced_preemption(model, alone):
    # Room for the long prompt and little else: growing answers must take blocks from each other.
    (token_bytes,) = {size for *settings, size in MODELS.values() if settings == list(model.values())}
    settings = {**SETTINGS, "kv_cache_memory": 2048 * token_bytes + (1 << 20)}
    with LLM(**model, **settings) as llm:
        work = [(PROMPTS[i], sampled(i)) for i in (15, 0, 4, 7, 9)]
        filler = [(PROMPTS[i] + " So" * 8, sampled(50 + i)) for i in range(12)]
        results = bits(llm.generate([p for p, _ in work + filler], [s for _, s in work + filler]))
        preemptions = llm.engine.core.scheduler.num_preemptions
    assert preemptions > 0
    assert results[1:5] + results[:1] == alone


def test_with_another_number_of_threads(model, alone):
    with LLM(**model, threads=1, **SETTINGS) as llm:
        assert bits(llm.generate([PROMPTS[i] for i in CHOSEN], [sampled(i) for i in CHOSEN])) == alone


def test_with_guesses_that_are_right(model):
    """Greedy answers of a small model repeat themselves: many tokens come several in a step."""
    greedy = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True, logprobs=1)
    prompts = [PROMPTS[i] for i in CHOSEN] + ["Say it again.\n" + "One day a fox met a crow in the wood. " * 3]
    with LLM(**model, num_speculative_tokens=0, **SETTINGS) as llm:
        expected = bits(llm.generate(prompts, greedy))
    with LLM(**model, num_speculative_tokens=15, **SETTINGS) as llm:
        accepted = 0
        for _ in range(10):  # while the machine is busy with something else, guesses may seem not to pay
            llm.engine.core.step_log.clear()
            assert bits(llm.generate(prompts, greedy)) == expected
            accepted += sum(step.num_accepted_tokens for step in llm.engine.core.step_log)
            if accepted > 100:
                break
        assert accepted > 100
