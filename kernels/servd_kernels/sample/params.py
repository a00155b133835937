"""Owns what `sample` is asked for and what it answers, as flat tensors on the device of the logits.
Does not know how a setting is applied (the backends)."""

from dataclasses import dataclass

import torch

# By failure code; 0: the row is fine.
FAILURES = (
    "",
    "the model's logits hold NaN",
    "the model's logits overflowed to infinity",
    "no token is left to sample: all are -inf",
    "a token id of its bias, its history or its answer is out of the vocabulary",
)
FAILED_NAN, FAILED_INFINITE, FAILED_EMPTY, FAILED_TOKEN_ID = 1, 2, 3, 4

HEADER = 4  # columns of SampleOutput.packed before the alternatives


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Values added to single logits, -inf to forbid a token. Row i owns entries offsets[i] to offsets[i + 1].

    A token may occur twice in a row only if one of its two values is -inf: the order of the additions is free.
    """

    offsets: torch.Tensor  # [num_rows + 1] int32
    token_ids: torch.Tensor  # [num_values] int32
    values: torch.Tensor  # [num_values] float32


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """All tokens so far of the rows that have a penalty; the others own none. Row i: offsets[i] to offsets[i + 1]."""

    offsets: torch.Tensor  # [num_rows + 1] int32
    token_ids: torch.Tensor  # [num_tokens] int32, the prompt's first
    num_prompt_tokens: torch.Tensor  # [num_rows] int32
    repetition: torch.Tensor  # [num_rows] float32, 1: none (Keskar et al. 2019, CTRL)
    presence: torch.Tensor  # [num_rows] float32
    frequency: torch.Tensor  # [num_rows] float32


@dataclass(frozen=True, slots=True)
class SampleParams:
    """The settings of the rows of one call; row i of the logits is row i of each tensor."""

    temperature: torch.Tensor  # [num_rows] float64, 0: greedy
    top_p: torch.Tensor  # [num_rows] float64, 1: all
    min_p: torch.Tensor  # [num_rows] float64, 0: all
    top_k: torch.Tensor  # [num_rows] int64, 0: all
    seeds: torch.Tensor  # [num_rows] int64: all 64 bits count
    positions: torch.Tensor  # [num_rows] int64 absolute position of the token to be sampled
    num_logprobs: torch.Tensor  # [num_rows] int64 alternatives to report; -1: no logprobs at all
    max_logprobs: int = -1  # the largest of num_logprobs, known without asking the device
    bias: LogitBias | None = None
    history: TokenHistory | None = None
    allowed: torch.Tensor | None = None
    """[num_rows, ceil(vocab_size / 32)] int32: bit t % 32 of word t // 32 allows token t (xgrammar, llguidance)."""
    given: torch.Tensor | None = None
    """[num_rows] int32: report on these tokens instead of choosing any (prompt logprobs)."""

    def check(self, logits: torch.Tensor) -> None:
        """Raises ValueError, naming the field, for a shape, dtype or device that does not fit logits."""
        num_rows, vocab_size = logits.shape
        for name, dtype in _ROW_FIELDS.items():
            _check(name, getattr(self, name), (num_rows,), dtype, logits.device)
        for part, fields in ((self.bias, _BIAS_FIELDS), (self.history, _HISTORY_FIELDS)):
            if part is None:
                continue
            for name, (length, dtype) in fields.items():
                tensor = getattr(part, name)
                expected = {"rows": num_rows, "rows+1": num_rows + 1, "any": len(part.token_ids)}[length]
                _check(name, tensor, (expected,), dtype, logits.device)
        if self.allowed is not None:
            _check("allowed", self.allowed, (num_rows, -(-vocab_size // 32)), torch.int32, logits.device)
        if self.given is not None:
            _check("given", self.given, (num_rows,), torch.int32, logits.device)
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs is {self.max_logprobs}; allowed: -1 (no logprobs) or more")


_ROW_FIELDS = dict.fromkeys(("temperature", "top_p", "min_p"), torch.float64) | dict.fromkeys(
    ("top_k", "seeds", "positions", "num_logprobs"), torch.int64
)
_BIAS_FIELDS = {
    "offsets": ("rows+1", torch.int32),
    "token_ids": ("any", torch.int32),
    "values": ("any", torch.float32),
}
_HISTORY_FIELDS = {
    "offsets": ("rows+1", torch.int32),
    "token_ids": ("any", torch.int32),
    "num_prompt_tokens": ("rows", torch.int32),
    "repetition": ("rows", torch.float32),
    "presence": ("rows", torch.float32),
    "frequency": ("rows", torch.float32),
}


def _check(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)} on {device}, "
            f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """One answer a row, in one array, so that one copy brings it to the host (`cpu`). All else here are views of it."""

    packed: torch.Tensor  # [num_rows, 4 + 2 * max(0, max_logprobs)] int32

    @property
    def token_ids(self) -> torch.Tensor:
        """[num_rows] int32; 0 where the row failed."""
        return self.packed[:, 0]

    @property
    def failures(self) -> torch.Tensor:
        """[num_rows] int32 indices of FAILURES; 0 where there is a token."""
        return self.packed[:, 1]

    @property
    def ranks(self) -> torch.Tensor:
        """[num_rows] int32: 1 + how many raw logits are higher; 0 where num_logprobs is -1 or the row failed."""
        return self.packed[:, 2]

    @property
    def logprobs(self) -> torch.Tensor:
        """[num_rows] float32, in nats, of raw logits; 0 where ranks is."""
        return self.packed[:, 3].view(torch.float32)

    @property
    def top_token_ids(self) -> torch.Tensor:
        """[num_rows, max_logprobs] int32 best first, ties by lower id; -1 beyond num_logprobs or the vocabulary."""
        return self.packed[:, HEADER : (self.packed.shape[1] + HEADER) // 2]

    @property
    def top_logprobs(self) -> torch.Tensor:
        """[num_rows, max_logprobs] float32 of top_token_ids; 0 where there is none."""
        return self.packed[:, (self.packed.shape[1] + HEADER) // 2 :].view(torch.float32)

    def cpu(self) -> "SampleOutput":
        """The same on the host: the one copy."""
        return SampleOutput(self.packed.cpu())


def width(params: SampleParams) -> int:
    """The number of columns of SampleOutput.packed."""
    return HEADER + 2 * max(0, params.max_logprobs)
