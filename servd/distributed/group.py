"""A tensor-parallel group: who this rank is, and how it sums and gathers with the others.

Knows nothing of layers or weights; it is passed in, never looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Collective = Callable[[Tensor], Tensor]


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class TPGroup:
    """`size` ranks that hold slices of the same matrices; this one is `rank`, counted from 0."""

    rank: int
    size: int
    all_reduce: Collective  # [...] summed over the ranks, same shape; may write into its argument
    all_gather: Collective  # [..., n] of each rank → [..., size * n], in the order of the ranks

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} of {self.size}"

    @classmethod
    def single(cls) -> TPGroup:
        """The group of one rank, whose collectives do nothing."""
        return cls(rank=0, size=1, all_reduce=_identity, all_gather=_identity)

    def shard(self, total: int) -> slice:
        """This rank's even share of `total` rows, which must divide by `size`."""
        assert total % self.size == 0, f"{total} does not divide by {self.size} ranks"
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def shard_or_replicate(self, total: int) -> slice:
        """Like `shard`, but where there are more ranks than rows, `size / total` neighbours hold the same row."""
        if total >= self.size:
            return self.shard(total)
        assert self.size % total == 0, f"{self.size} ranks do not divide by {total}"
        row = self.rank // (self.size // total)
        return slice(row, row + 1)
