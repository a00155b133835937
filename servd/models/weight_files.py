"""The contract of a checkpoint format: which tensors there are, and each in its turn.

Knows nothing of models, or of what the tensors are for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator

import torch
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor


class WeightFiles(ABC):
    """The tensors of one checkpoint, read from disk when their turn comes. Never unpickles anything."""

    @abstractmethod
    def names(self) -> list[str]:
        """Hugging Face names of all tensors, in the order of `tensors`; read from headers alone."""

    @abstractmethod
    def stored_dtype(self) -> torch.dtype:
        """The compute dtype that suits what is stored."""

    @property
    @abstractmethod
    def is_quantized(self) -> bool:
        """Whether any matrix is held as codes and scales; read from headers alone."""

    @abstractmethod
    def tensors(self, dtype: torch.dtype, coded: Container[str] = ()) -> Iterator[tuple[str, Tensor | GroupedWeight]]:
        """Name and tensor, on the CPU, in `dtype` or any other floating type; valid until the next one is asked for.

        A matrix named in `coded` comes as codes and scales, exactly as the file has them, if it has them, to keep.
        Raises ConfigError naming the tensor for a type that is not supported.
        """
