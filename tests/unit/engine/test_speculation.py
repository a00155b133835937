"""Several tokens of a request in one step: whatever a caller sees is what single steps give."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from servd.outputs import RequestOutput
from servd.request import FinishReason
from servd.sampling_params import SamplingParams
from tests.fakes import EOS, FakeEngine
from tests.unit.engine.test_async_engine import answer, run

REPLIES = {"hi": "hello wide world, hello again and again", "long": "na" * 200}


def all_news(folder: Path, prompt: str, params: SamplingParams, drafts: int) -> RequestOutput:
    output: RequestOutput = run(
        folder,
        lambda fake: answer(fake, prompt, params, request_id="r"),
        settings={"num_speculative_tokens": drafts},
        executor_options={"replies": REPLIES},
    )
    return output


@pytest.mark.parametrize("drafts", [1, 7, 32])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=100),
        SamplingParams(max_tokens=13),
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=100, stop=("world",)),
        SamplingParams(max_tokens=100, stop=("d, h", "again"), include_stop_str_in_output=True),
        SamplingParams(max_tokens=16, stop=("world",)),  # complete just as the tokens run out
        SamplingParams(max_tokens=100, stop=("l",), min_tokens=8),
        SamplingParams(max_tokens=100, stop_token_ids=(ord("w"),)),
        SamplingParams(max_tokens=100, stop_token_ids=(ord("w"),), include_stop_str_in_output=True),
        SamplingParams(max_tokens=100, stop_token_ids=(ord("w"),), stop=("hello w",)),
        SamplingParams(max_tokens=100, stop=("never",), logprobs=2),
        SamplingParams(max_tokens=100, stop=("rld",), logprobs=2, prompt_logprobs=1),
        SamplingParams(max_tokens=60, min_tokens=50),
    ],
)
def test_a_caller_sees_the_same(tmp_path: Path, params: SamplingParams, drafts: int) -> None:
    params = msgspec.structs.replace(params, temperature=0.0)
    assert all_news(tmp_path, "hi", params, drafts) == all_news(tmp_path, "hi", params, 0)


def test_usage_counts_no_token_behind_a_stop_string(tmp_path: Path) -> None:
    output = all_news(tmp_path, "hi", SamplingParams(max_tokens=100, stop=("wide",), temperature=0.0), 32)
    assert (output.text, output.stop_reason, output.finish_reason) == ("hello ", "wide", FinishReason.STOP)
    assert bytes(output.token_ids) == b"hello wide" and output.num_output_tokens == 10


def test_steps_and_metrics_tell_of_guesses(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> tuple[int, int, str]:
        params = SamplingParams(max_tokens=200, temperature=0.0, stop_token_ids=(EOS,))
        output = await answer(fake, "long", params, request_id="r")
        assert len(output.token_ids) == 200
        steps = fake.engine.core.step_log
        drafted, accepted = sum(s.num_draft_tokens for s in steps), sum(s.num_accepted_tokens for s in steps)
        return drafted, accepted, fake.engine.metrics.render().decode()

    drafted, accepted, text = run(tmp_path, scenario, executor_options={"replies": REPLIES})
    assert 0 < accepted < drafted
    assert f"servd_spec_drafted_tokens_total {drafted:.1f}" in text
    assert f"servd_spec_accepted_tokens_total {accepted:.1f}" in text
    assert "servd_generation_tokens_total 200.0" in text
    assert "servd_inter_token_latency_seconds_count 199.0" in text
