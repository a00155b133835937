"""Rows a few at a time: work along rows of [num_rows, vocab_size] arrays whose temporaries should stay in cache.

Knows nothing of the work; results cannot depend on the slicing, since rows do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# On a CPU, 32 rows of 49,152 float64 numbers are 12 MB for every temporary: fresh pages each time, twice the cost of
# the arithmetic. Four rows fit in a core's L2 cache.
CPU_ROWS = 4


def row_slices(rows: Tensor) -> Iterator[slice]:
    """Slices that cover the first axis of `rows`: small ones on a CPU, one on a GPU."""
    step = CPU_ROWS if rows.device.type == "cpu" else max(1, len(rows))
    for begin in range(0, len(rows), step):
        yield slice(begin, begin + step)
