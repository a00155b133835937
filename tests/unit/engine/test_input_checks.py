"""What the engine refuses at the call, and how it says so."""

import pytest

from servd.errors import InvalidRequestError
from servd.sampling_params import SamplingParams
from tests.unit.engine.test_async_engine import GREEDY, answer, run


@pytest.mark.parametrize(
    "prompt, params, param",
    [
        ([], GREEDY, "prompt"),
        ([1] * 2048, GREEDY, "prompt"),
        ([1] * 2000, SamplingParams(max_tokens=100), "max_tokens"),
        ([1], SamplingParams(max_tokens=-1), "max_tokens"),
        ([1], SamplingParams(temperature=float("nan")), "temperature"),
        ([1], SamplingParams(top_p=1.5), "top_p"),
        ([1], SamplingParams(logit_bias={257: 1.0}), "logit_bias"),
        ([1], SamplingParams(stop_token_ids=(-1,)), "stop_token_ids"),
        ([1], SamplingParams(max_tokens=2, min_tokens=3), "min_tokens"),
        ([1], SamplingParams(n=0), "n"),
        ([1], SamplingParams(logprobs=21), "logprobs"),
        ([1], SamplingParams(stop=("",)), "stop"),
        ([1], SamplingParams(stop=("x" * 2000,)), "stop"),
        ([1], SamplingParams(stop=("x",) * 17), "stop"),
        ([1], SamplingParams(stop_token_ids=(1,) * 300), "stop_token_ids"),
        ([1], SamplingParams(logit_bias=dict.fromkeys(range(2000), 1.0)), "logit_bias"),
        ([1], SamplingParams(logit_bias={1: float("inf")}), "logit_bias"),
        ([1], SamplingParams(seed=1 << 64), "seed"),
        ([1], SamplingParams(top_k=-1), "top_k"),
        ([1], SamplingParams(min_p=2.0), "min_p"),
        # What the type checker would refuse, and a worker process cannot decode.
        ([1.0], GREEDY, "prompt"),
        ([True], GREEDY, "prompt"),
        ([-1], GREEDY, "prompt"),
        ([257], GREEDY, "prompt"),
        ([1], SamplingParams(stop="END"), "stop"),
        ([1], SamplingParams(stop=(5,)), "stop"),
        ([1], SamplingParams(stop=("\ud800",)), "stop"),
        ([1], SamplingParams(stop_token_ids=(1.0,)), "stop_token_ids"),
        ([1], SamplingParams(logit_bias={1.0: 1.0}), "logit_bias"),
        ([1], SamplingParams(logit_bias={"1": 1.0}), "logit_bias"),
        ([1], SamplingParams(logit_bias=[1]), "logit_bias"),
        ([1], SamplingParams(ignore_eos="no"), "ignore_eos"),
    ],
)
def test_wrong_input_is_refused_at_the_call_naming_the_field(tmp_path, prompt, params, param):
    async def scenario(fake):
        with pytest.raises(InvalidRequestError) as caught:
            fake.engine.generate(prompt, params, request_id="r")
        return caught.value

    error = run(tmp_path, scenario)
    assert error.param == param
    assert param in error.message and "allowed" in error.message


def test_a_request_id_that_cannot_be_sent_is_refused(tmp_path):
    async def scenario(fake):
        with pytest.raises(InvalidRequestError, match="request_id"):
            fake.engine.generate([1], GREEDY, request_id="\ud800")

    run(tmp_path, scenario)


def test_a_prompt_list_that_the_caller_changes_later_is_not_ours(tmp_path):
    async def scenario(fake):
        prompt = list(b"abc")
        stream = fake.engine.generate(prompt, GREEDY, request_id="r")
        prompt[:] = [256] * 99
        async with stream:
            text = "".join([output.text async for output in stream])
        return text, (await answer(fake, "abc")).text

    text, expected = run(tmp_path, scenario)
    assert text == expected


def test_a_name_in_use_is_refused(tmp_path):
    async def scenario(fake):
        async with fake.engine.generate([1], SamplingParams(max_tokens=100), request_id="r"):
            with pytest.raises(InvalidRequestError, match="request_id"):
                fake.engine.generate([1], GREEDY, request_id="r")

    run(tmp_path, scenario)
