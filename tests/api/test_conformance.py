"""All dialects over one engine: the same request gives the same tokens, and the same wrong value the same refusal.

A new dialect is a function in `dialects.DIALECTS`; a new request is a row here.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.api.dialects import DIALECTS, RefusedError, UnsayableError, fronts
from tests.api.grpc.grpc_helpers import run

REPLIES = {"Tell me": "Once – 🗼. STOP and no more"}

SAME: dict[str, dict[str, Any]] = {
    "defaults and a seed": {"seed": 7},
    "greedy": {"temperature": 0.0, "max_tokens": 40},
    "seeded": {"seed": -(1 << 63), "temperature": 1.3, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "max_tokens": 30},
    "one token": {"max_tokens": 1, "seed": 1},
    "stop text": {"stop": ["STOP"], "seed": 1, "max_tokens": 50},
    "stop text shown": {"stop": ["STOP"], "include_stop_str_in_output": True, "seed": 1, "max_tokens": 50},
    "stop token": {"stop_token_ids": [ord("S")], "seed": 1, "max_tokens": 50},
    "min_tokens": {"min_tokens": 60, "max_tokens": 70, "seed": 1},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 60, "seed": 1},
    "logit_bias": {"logit_bias": {120: 100.0}, "max_tokens": 5, "seed": 1},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.2, "seed": 2},
    "several answers": {"n": 3, "seed": 5, "max_tokens": 12},
    "beams": {"use_beam_search": True, "best_of": 3, "n": 2, "length_penalty": 0.5, "max_tokens": 6},
    "log-probabilities": {"logprobs": 2, "seed": 5, "max_tokens": 12},
}


@pytest.mark.parametrize("replies", [REPLIES, {}], ids=["a reply that ends", "letters without end"])
@pytest.mark.parametrize("case", SAME)
def test_the_same_request_gives_the_same_answer(case: str, replies: dict[str, str], tmp_path: Path) -> None:
    async def test() -> None:
        async with fronts(tmp_path, replies=replies) as f:
            f.fake.engine.sampling_defaults = {"top_k": 50}  # as from a model's generation_config.json
            told = {}
            for name, ask in DIALECTS.items():
                with suppress(UnsayableError):
                    told[name] = await ask(f, SAME[case])
            assert len(told) >= len(DIALECTS) - 2
            whole = told["gRPC Generate"]
            assert whole.token_ids is not None and all(whole.token_ids)
            for name, one in told.items():
                assert one.texts == whole.texts, name
                assert one.finish_reasons == whole.finish_reasons, name
                for part in ("token_ids", "logprobs", "num_prompt_tokens"):
                    assert getattr(one, part) in (None, getattr(whole, part)), (name, part)

    run(test)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature below": ({"temperature": -0.5}, "temperature"),
    "temperature above": ({"temperature": 100.5}, "temperature"),
    "top_p 0": ({"top_p": 0.0}, "top_p"),
    "top_p above": ({"top_p": 1.5}, "top_p"),
    "top_k below": ({"top_k": -2}, "top_k"),
    "min_p above": ({"min_p": 1.5}, "min_p"),
    "presence_penalty": ({"presence_penalty": 2.5}, "presence_penalty"),
    "frequency_penalty": ({"frequency_penalty": -2.5}, "frequency_penalty"),
    "repetition_penalty": ({"repetition_penalty": 0.0}, "repetition_penalty"),
    "n 0": ({"n": 0}, "n"),
    "n above": ({"n": 129}, "n"),
    "max_tokens below": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens beyond the context": ({"max_tokens": 4000}, "max_tokens"),
    "min_tokens above max_tokens": ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    "an empty stop": ({"stop": [""]}, "stop"),
    "too many stops": ({"stop": ["x"] * 17}, "stop"),
    "a long stop": ({"stop": ["x" * 1025]}, "stop"),
    "stop token out of the vocabulary": ({"stop_token_ids": [257]}, "stop_token_ids"),
    "logit_bias out of the vocabulary": ({"logit_bias": {257: 1.0}}, "logit_bias"),
    "logit_bias above": ({"logit_bias": {1: 101.0}}, "logit_bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_same_wrong_value_is_refused_alike(case: str, tmp_path: Path) -> None:
    settings, blamed = REFUSED[case]

    async def test() -> None:
        async with fronts(tmp_path) as f:
            messages = {}
            for name, ask in DIALECTS.items():
                with pytest.raises((RefusedError, UnsayableError)) as refusal:
                    await ask(f, settings)
                if not isinstance(refusal.value, RefusedError):
                    continue
                assert refusal.value.field.split(".")[0] == blamed, name
                assert refusal.value.status in ("400", "INVALID_ARGUMENT", "error_message"), name
                assert "allowed: " in refusal.value.message, name
                messages[name] = refusal.value.message
            assert len(set(messages.values())) <= 2, messages  # HTTP's own schema may be the first to see it

    run(test)
