"""From logits to the step's answers: one call of the `sample` op, one array to the host, unpacked for the engine.

Owns the binding of the op to the device. Knows nothing of requests, nor of how a token is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from servd_kernels.sample import FAILURES, OP, SampleOutput, SampleParams
from torch import Tensor

from servd.outputs import TokenLogprobs
from servd.worker.sampling_metadata import SamplingMetadata, given_tokens


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One step's tokens; row i of the logits is entry i."""

    token_ids: npt.NDArray[np.int64]  # [num_rows] 0 where the row failed
    logprobs: list[TokenLogprobs | None]  # [num_rows]
    failed: dict[int, str]  # row → why it has no token


class Sampler:
    """Samples one token for each row. A row's answer is the same, bit for bit, alone and in any batch."""

    def __init__(self, device: torch.device) -> None:
        self._run = OP.bind(device.type, torch.float32)

    def __call__(self, logits: Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Sample from `logits` [num_rows, vocab_size] float32, which is left as it is."""
        return self._answer(logits, metadata.params(logits.device))

    def report(self, logits: Tensor, token_ids: npt.NDArray[np.int64], num_top: int) -> SamplerOutput:
        """Logprobs of `token_ids` [num_rows] under `logits` [num_rows, vocab_size] float32, with alternatives."""
        return self._answer(logits, given_tokens(token_ids, num_top, logits.device))

    def _answer(self, logits: Tensor, params: SampleParams) -> SamplerOutput:
        output = SampleOutput(self._run(logits, params)).cpu()
        failures = output.failures.numpy()
        logprobs: list[TokenLogprobs | None] = [None] * len(logits)
        if params.max_logprobs >= 0:
            logprobs = unpack_logprobs(output)
        return SamplerOutput(
            token_ids=output.token_ids.numpy().astype(np.int64),
            logprobs=logprobs,
            failed={row: FAILURES[failures[row]] for row in np.flatnonzero(failures).tolist()},
        )


def unpack_logprobs(output: SampleOutput) -> list[TokenLogprobs | None]:
    """[num_rows] None for rows that asked for none, or that failed: these have no rank."""
    result: list[TokenLogprobs | None] = []
    num_top = (output.top_token_ids >= 0).sum(dim=1)
    columns = (output.token_ids, output.logprobs, output.ranks, output.top_token_ids, output.top_logprobs, num_top)
    for token, logprob, rank, top_ids, top_logprobs, n in zip(*(column.tolist() for column in columns), strict=True):
        found = TokenLogprobs(token, logprob, rank, top_token_ids=top_ids[:n], top_logprobs=top_logprobs[:n])
        result.append(found if rank else None)
    return result
