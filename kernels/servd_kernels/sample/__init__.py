"""Owns the step from logits to tokens: penalties, masks, filters, the draw, and log-probabilities, in one call.
Does not know requests: a row is a row of logits with its settings."""

import torch

from servd_kernels.registry import Op
from servd_kernels.sample.params import FAILURES, LogitBias, SampleOutput, SampleParams, TokenHistory
from servd_kernels.strides import check_last_stride

__all__ = ["FAILURES", "OP", "LogitBias", "SampleOutput", "SampleParams", "TokenHistory", "sample"]

OP = Op("sample")


def sample(logits: torch.Tensor, params: SampleParams, backend: str | None = None) -> SampleOutput:
    """One token for each row of `logits` [num_rows, vocab_size] float32, which is left as it is.

    In vLLM's order: the allowed mask and bias (values of -inf forbid); repetition (divides logits above zero,
    multiplies those below), frequency and presence penalties; then the highest logit where the temperature is 0, else
    a draw from softmax(logits / temperature) after top-k, top-p over what top-k left (Holtzman et al. 2020), and min-p
    (Nguyen et al. 2024). The draw inverts the cumulative distribution in the order of token ids at u times its total;
    u is Philox-4x32-10 (Salmon et al. 2011) of (seed, position). Everywhere, equal logits rank by lower token id.
    Log-probabilities (nats) and ranks are those of the raw logits.

    A row's answer depends on that row alone, bit for bit; backends may differ from each other in the last bits of sums
    (the reference's are float64, native ones float32 within blocks of 64 tokens, in one order). A row with NaN, with
    +inf, without a finite logit, or with a token id out of the vocabulary has a failure code and no token. Raises
    ValueError, naming the field, for shapes, dtypes or devices that do not fit.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(
            f"logits must be float32 [num_rows, vocab_size] with tokens, not {logits.dtype} {list(logits.shape)}"
        )
    check_last_stride(logits=logits)
    params.check(logits)
    return SampleOutput(OP.bind(logits.device.type, logits.dtype, backend)(logits, params))
