"""The requests behind one call: as many as answers are to be written, alike but for ids and seeds.

Knows nothing of who runs them.
"""

from __future__ import annotations

from servd.request import Request
from servd.sampling_params import SamplingParams

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads the seeds of a request's answers


def new_answers(
    request_id: str,
    count: int,
    prompt_token_ids: list[int],
    params: SamplingParams,
    *,
    seed: int,
    eos_token_ids: frozenset[int],
    max_model_len: int,
    priority: int,
    cache_salt: str,
    pin_id: str | None,
) -> list[Request]:
    """`count` requests '<request_id>#<index>'; the first one's seed is `seed`.

    The others begin in its blocks, unless each must compute all positions for the prompt's log-probabilities.
    """
    shares_prompt = params.prompt_logprobs is None
    return [
        Request(
            f"{request_id}#{index}", prompt_token_ids, params,
            seed=(seed + index * _GOLDEN) & _MASK64,
            eos_token_ids=eos_token_ids,
            max_model_len=max_model_len,
            priority=priority,
            parent_id=f"{request_id}#0" if index and shares_prompt else None,
            cache_salt=cache_salt,
            pin_id=pin_id,
        )
        for index in range(count)
    ]  # fmt: skip
