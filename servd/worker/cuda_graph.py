"""Decode steps as graphs: one for each class of batch size and of block-table width, captured when first needed.

Knows nothing of models: it captures a function of tensors that stay where they are. A smaller batch is padded with rows
that read the null block and write nothing; a row's bits depend on that row alone, so they change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from servd.attention.metadata import AttentionMetadata
from servd.worker.input_batch import PackedBatch

Forward = Callable[[Tensor, Tensor, AttentionMetadata, list[Tensor]], Tensor]
Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]

MIN_WIDTH = 16  # blocks; narrower tables share one class


def batch_class(num_reqs: int) -> int:
    """Rows of the graph that serves so many: powers of two to 8, then multiples of 8: at most 7 rows are wasted."""
    if num_reqs <= 8:
        return 1 << (num_reqs - 1).bit_length()
    return -(-num_reqs // 8) * 8


def width_class(num_blocks: int, max_blocks: int) -> int:
    """Columns of the block table of the graph that serves so many: powers of two, at most `max_blocks`."""
    return min(max_blocks, max(MIN_WIDTH, 1 << max(0, num_blocks - 1).bit_length()))


class CudaCapture:
    """Records steps as CUDA graphs. They share their memory: a replay overwrites what the one before returned."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        """Record `step`; the replay returns the tensor that the recorded call returned."""
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # kernels compile and libraries allocate on their first call, which a capture forbids
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class DecodeGraphs:
    """Runs steps in which every request computes one token, through graphs."""

    def __init__(
        self,
        forward: Forward,
        kv_caches: Sequence[Tensor],
        *,
        max_num_seqs: int,
        max_blocks: int,
        device: torch.device,
        capture: Capture,
    ) -> None:
        """`max_blocks`: columns of the widest block table; `capture` records a step and returns its replay."""
        self._forward = forward
        self._kv_caches = list(kv_caches)
        self._max_blocks = max_blocks
        self._device = device
        self._capture = capture
        rows = batch_class(max_num_seqs)

        def buffer(value: int, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        self._input_ids = buffer(0, torch.int64)
        self._positions = buffer(0, torch.int64)
        self._slot_mapping = buffer(-1, torch.int64)
        self._seq_lens = buffer(1, torch.int32)
        self._cu_seqlens_q = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._block_tables: dict[int, Tensor] = {}  # by width: [rows, width]
        self._graphs: dict[tuple[int, int], Replay] = {}

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def run(self, packed: PackedBatch) -> Tensor | None:
        """Hidden states [num_tokens, hidden_size], valid until the next call; None if this step has longer chunks."""
        num_reqs = len(packed.request_ids)
        if len(packed.input_ids) != num_reqs:
            return None
        rows, width = batch_class(num_reqs), width_class(packed.block_tables.shape[1], self._max_blocks)
        tables = self._tables(width)
        _fill(self._input_ids[:rows], packed.input_ids, 0)
        _fill(self._positions[:rows], packed.positions, 0)
        _fill(self._slot_mapping[:rows], packed.slot_mapping, -1)
        _fill(self._seq_lens[:rows], packed.seq_lens, 1)
        columns = packed.block_tables.shape[1]
        tables[:num_reqs, :columns] = torch.from_numpy(packed.block_tables).to(self._device, non_blocking=True)
        tables[num_reqs:rows, 0] = 0  # what lies in the other columns belongs to no key
        replay = self._graphs.get((rows, width))
        if replay is None:
            replay = self._graphs[rows, width] = self._capture(lambda: self._step(rows, width))
        return replay()[:num_reqs]

    def _tables(self, width: int) -> Tensor:
        if width not in self._block_tables:
            shape = (len(self._input_ids), width)
            self._block_tables[width] = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._block_tables[width]

    def _step(self, rows: int, width: int) -> Tensor:
        metadata = AttentionMetadata(
            cu_seqlens_q=self._cu_seqlens_q[: rows + 1],
            seq_lens=self._seq_lens[:rows],
            block_tables=self._block_tables[width][:rows],
            slot_mapping=self._slot_mapping[:rows],
        )
        return self._forward(self._input_ids[:rows], self._positions[:rows], metadata, self._kv_caches)


def _fill(buffer: Tensor, values: npt.NDArray[np.int32] | npt.NDArray[np.int64], padding: int) -> None:
    buffer[: len(values)] = torch.from_numpy(values).to(buffer.device, non_blocking=True)
    buffer[len(values) :] = padding
