"""Steps of a CPU as recordings: one for each shape of step that comes again, made when it does, replayed by one call.

The twin of cuda_graph.py, for native kernels: a layer then costs no interpreter time. Knows nothing of models: it
records a function of tensors that stay where they are. Steps are not padded, so a recording serves one shape alone.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from servd_kernels.recorder import NotRecordableError, Recorder, Recording, StepFailedError
from torch import Tensor

from servd.attention.metadata import AttentionMetadata
from servd.worker.input_batch import PackedBatch

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, AttentionMetadata, list[Tensor]], Tensor]
Shape = tuple[int, int]  # tokens, requests

MAX_TOKENS = 256  # of a step that is recorded: in longer ones the interpreter's share is too small to matter
MAX_RECORDINGS = 512  # the longest unused goes first; each holds some 60 KB
MAX_COUNTED = 4096  # shapes that were seen once
SEEN_BEFORE = 1  # times; a recording costs about what it saves in five replays


class RecordedSteps:
    """Runs steps of a shape that was seen before through recordings."""

    def __init__(
        self, forward: Forward, kv_caches: Sequence[Tensor], *, max_num_seqs: int, max_blocks: int
    ) -> None:
        """`max_blocks`: columns of the widest block table."""
        self._forward = forward
        self._kv_caches = list(kv_caches)
        self._record: Recorder | None = Recorder()
        self._input_ids, self._positions, self._slot_mapping = np.zeros((3, MAX_TOKENS), np.int64)
        self._seq_lens = np.ones(max_num_seqs, np.int32)
        self._cu_seqlens_q = np.zeros(max_num_seqs + 1, np.int32)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self._recordings: OrderedDict[Shape, Recording] = OrderedDict()
        self._seen: Counter[Shape] = Counter()

    @property
    def num_recordings(self) -> int:
        """Recordings held."""
        return len(self._recordings)

    def run(self, packed: PackedBatch) -> Tensor | None:
        """Hidden states [num_tokens, hidden_size], valid until the next call; None if the step is to run as usual."""
        shape = num_tokens, num_reqs = len(packed.input_ids), len(packed.request_ids)
        if self._record is None or num_tokens > MAX_TOKENS:
            return None
        recording = self._recordings.get(shape)
        if recording is None and not self._is_due(shape):
            return None
        self._input_ids[:num_tokens] = packed.input_ids
        self._positions[:num_tokens] = packed.positions
        self._slot_mapping[:num_tokens] = packed.slot_mapping
        self._seq_lens[:num_reqs] = packed.seq_lens
        self._cu_seqlens_q[: num_reqs + 1] = packed.cu_seqlens_q
        # What lies in columns beyond belongs to no key.
        self._block_tables[:num_reqs, : packed.block_tables.shape[1]] = packed.block_tables
        if recording is None:
            return self._make(shape)
        self._recordings.move_to_end(shape)
        try:
            return recording.replay()
        except StepFailedError:
            return None  # run as usual, the step says what is wrong with it

    def _is_due(self, shape: Shape) -> bool:
        if self._seen[shape] >= SEEN_BEFORE:
            return True
        if len(self._seen) >= MAX_COUNTED:
            self._seen.clear()
        self._seen[shape] += 1
        return False

    def _make(self, shape: Shape) -> Tensor | None:
        num_tokens, num_reqs = shape
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q[: num_reqs + 1]),
            seq_lens=torch.from_numpy(self._seq_lens[:num_reqs]),
            block_tables=torch.from_numpy(self._block_tables[:num_reqs]),
            slot_mapping=torch.from_numpy(self._slot_mapping[:num_tokens]),
        )
        input_ids, positions = (torch.from_numpy(a[:num_tokens]) for a in (self._input_ids, self._positions))
        assert self._record is not None, "recording was given up"
        try:
            recording = self._record(lambda: self._forward(input_ids, positions, metadata, self._kv_caches))
        except NotRecordableError as error:
            logger.info("steps of this model are not recorded: %s", error)
            self._record = None
            return None
        if len(self._recordings) >= MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        self._recordings[shape] = recording
        return recording.output
