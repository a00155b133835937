"""Steps of a CPU as one recording: the native calls of the model's layers, replayed for a step of any shape.

The twin of cuda_graph.py, for native kernels: a layer then costs no interpreter time. Nothing is padded. Knows nothing
of models: it records a function of tensors that stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from servd_kernels.recorder import NotRecordableError, Recording, StepFailedError
from torch import Tensor

from servd.attention.metadata import AttentionMetadata
from servd.worker.input_batch import PackedBatch

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, AttentionMetadata, list[Tensor]], Tensor]


class RecordedSteps:
    """Runs steps of up to `max_tokens` through a recording, if the model can be recorded."""

    def __init__(
        self, forward: Forward, kv_caches: Sequence[Tensor], *, max_tokens: int, max_num_seqs: int, max_blocks: int
    ) -> None:
        """`max_blocks`: columns of the widest block table. Records at once, on tokens that are written nowhere."""
        self._forward = forward
        self._kv_caches = list(kv_caches)
        self._max_tokens = max_tokens
        # A recording is made from a few small steps: they must fit, whatever the limits of real ones.
        rows, requests = max(max_tokens, 32), max(max_num_seqs, 16)
        self._input_ids, self._positions = np.zeros((2, rows), np.int64)
        self._slot_mapping = np.full(rows, -1, np.int64)
        self._seq_lens = np.ones(requests, np.int32)
        self._cu_seqlens_q = np.zeros(requests + 1, np.int32)
        self._block_tables = np.zeros((requests, max_blocks), np.int32)
        self._recording: Recording | None = None
        try:
            with torch.inference_mode():
                self._recording = Recording(self._dry_step, rows)
        except NotRecordableError as error:
            logger.info("steps of this model are not recorded: %s", error)

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._recording is not None

    def run(self, packed: PackedBatch) -> Tensor | None:
        """Hidden states [num_tokens, hidden_size], valid until the next call; None if the step is to run as usual."""
        num_tokens, num_reqs = len(packed.input_ids), len(packed.request_ids)
        if self._recording is None or num_tokens > self._max_tokens:
            return None
        self._input_ids[:num_tokens] = packed.input_ids
        self._positions[:num_tokens] = packed.positions
        self._slot_mapping[:num_tokens] = packed.slot_mapping
        self._seq_lens[:num_reqs] = packed.seq_lens
        self._cu_seqlens_q[: num_reqs + 1] = packed.cu_seqlens_q
        # What lies in columns beyond belongs to no key.
        self._block_tables[:num_reqs, : packed.block_tables.shape[1]] = packed.block_tables
        try:
            return self._recording.replay(num_tokens, num_reqs)
        except StepFailedError:
            return None  # run as usual, the step says what is wrong with it

    def _dry_step(self, num_tokens: int, num_reqs: int) -> Tensor:
        """The first request has all tokens but one of each other; all look at the null block, none is written."""
        self._seq_lens[0] = num_tokens - num_reqs + 1
        self._cu_seqlens_q[1 : num_reqs + 1] = np.arange(num_tokens - num_reqs + 1, num_tokens + 1)
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q)[: num_reqs + 1],
            seq_lens=torch.from_numpy(self._seq_lens)[:num_reqs],
            block_tables=torch.from_numpy(self._block_tables)[:num_reqs],
            slot_mapping=torch.from_numpy(self._slot_mapping)[:num_tokens],
        )
        input_ids, positions = (torch.from_numpy(a)[:num_tokens] for a in (self._input_ids, self._positions))
        return self._forward(input_ids, positions, metadata, self._kv_caches)
