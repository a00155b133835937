"""Owns what a layer may ask of attention beyond causal softmax: fixed when the layer is built.
Does not know requests or the cache."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """A query at position p sees keys 0..p, with these changes, applied in this order."""

    logn_train_len: int = 0
    """Queries are scaled by max(1, ln(p + 1) / ln(logn_train_len)); 0: not (Su 2021, "entropy invariance")."""
    alibi_slopes: torch.Tensor | None = None
    """[num_q_heads] float32; slope * (key position - p) is added to a score (Press et al. 2021, ALiBi)."""
    logit_softcap: float = 0.0
    """Scores become cap * tanh(score / cap); 0: not (Gemma 2). After ALiBi."""
    sliding_window: int = 0
    """Only the last so many keys are seen, the query's own included; 0: all (Beltagy et al. 2020)."""
    num_sink_tokens: int = 0
    """With a window: this many first keys stay visible (Xiao et al. 2023, StreamingLLM)."""
    sink_logits: torch.Tensor | None = None
    """[num_q_heads] float32; one more logit in each row's softmax, which has no value (gpt-oss)."""

    def check(self, num_q_heads: int) -> None:
        """Raises ValueError, naming the option, for one out of range."""
        for name in ("logn_train_len", "logit_softcap", "sliding_window", "num_sink_tokens"):
            value = getattr(self, name)
            if value < 0 or (name == "logn_train_len" and value == 1):
                raise ValueError(f"{name} is {value}; allowed: 0 (off) or more")
        for name in ("alibi_slopes", "sink_logits"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.shape != (num_q_heads,) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous float32 [{num_q_heads}], not {tensor.dtype} {list(tensor.shape)}"
                )
        if self.num_sink_tokens and not self.sliding_window:
            raise ValueError(f"num_sink_tokens is {self.num_sink_tokens} without a sliding_window; allowed: 0")


PLAIN = AttentionOptions()
