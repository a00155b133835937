"""From the hidden states of a prompt to one vector: the last token's, the first's, or the mean of all.

Owns what is left of a prompt between its chunks. Knows nothing of models or of what the vectors are for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from servd.outputs import SchedulerOutput
from servd.worker.input_batch import PackedBatch

NOT_FINITE = "its hidden states hold NaN or infinity"


@dataclass(slots=True)
class _Pool:
    """One prompt being pooled. Sums run over positions in order, in float64: the bits do not depend on the chunks."""

    pooling: str
    num_prompt_tokens: int
    next_position: int = 0  # of mean and cls, which need every position from 0 on
    vector: npt.NDArray[Any] | None = None  # [hidden_size] the sum so far, or the first position's

    def take(self, first: int, hidden: Tensor) -> npt.NDArray[np.float32] | None:
        """Take in positions from `first` on, hidden [num_tokens, hidden_size]; the vector once the prompt is whole."""
        end = first + len(hidden)
        is_whole = end == self.num_prompt_tokens
        if self.pooling == "last":
            return _rows(hidden[-1:])[0] if is_whole else None
        assert first == self.next_position, f"positions from {first} on come after {self.next_position}"
        self.next_position = end
        if self.pooling == "cls":
            if first == 0:
                self.vector = _rows(hidden[:1])[0]
        else:
            rows = _rows(hidden).astype(np.float64)
            total = np.zeros(rows.shape[1]) if self.vector is None else self.vector
            for row in rows:
                total += row
            self.vector = total
        if not is_whole or self.vector is None:
            return None
        scale = self.num_prompt_tokens if self.pooling == "mean" else 1
        return np.asarray(self.vector / scale, np.float32)


def _rows(hidden: Tensor) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = hidden.float().cpu().numpy()
    return rows.copy()  # a replayed step writes over its hidden states


class Pooler:
    """The prompts of a batch that are pooled."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}

    def apply(self, plan: SchedulerOutput) -> None:
        """Forget requests and begin new ones, as the plan says."""
        for request_id in plan.dropped_request_ids:
            self._pools.pop(request_id, None)
        for new in plan.new_requests:
            pooling = new.sampling_params.pooling
            if pooling is not None:
                self._pools[new.request_id] = _Pool(pooling, new.num_prompt_tokens)

    def pool(self, packed: PackedBatch, hidden: Tensor, fail: Callable[[str, str], None]) -> dict[str, bytes]:
        """Take in a step; the vectors of prompts that ended in it, as little-endian float32 of [hidden_size].

        `fail` is told of requests whose vector is not finite.
        """
        found: dict[str, bytes] = {}
        if not self._pools:
            return found
        bounds = packed.cu_seqlens_q.tolist()
        for i, request_id in enumerate(packed.request_ids):
            pool = self._pools.get(request_id)
            if pool is None:
                continue
            begin, end = bounds[i], bounds[i + 1]
            vector = pool.take(int(packed.positions[begin]), hidden[begin:end])
            if vector is None:
                continue
            if np.isfinite(vector).all():
                found[request_id] = vector.astype("<f4").tobytes()
            else:
                fail(request_id, NOT_FINITE)
        return found
