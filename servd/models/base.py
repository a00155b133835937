"""The contract of a model, and the table of known architectures.

Knows nothing of files, requests or sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from servd_kernels.kv_format import KVFormat
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.attention.metadata import AttentionMetadata
from servd.layers.base import Layer, LayerContext, WeightSlot
from servd.registry import Registry


class Model(ABC):
    """A decoder over one packed token axis: no padding, no notion of prefill or decode."""

    # Whether llama.cpp's converter reorders the rows of q and k of this family for its own rotary kernel.
    gguf_permutes_qk: ClassVar[bool] = False

    num_layers: int
    num_kv_heads: int  # on this rank
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int  # positions that the rotary table covers, any scaling included
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def __init__(self, config: Mapping[str, Any], context: LayerContext) -> None:
        """Build the layers with room for their weights. `config` is config.json in Hugging Face form.

        Raises ConfigError naming a field that is missing or not supported.
        """

    @abstractmethod
    def layers(self) -> Iterable[Layer]:
        """Every layer that owns weights, in the order in which they are finished after loading."""

    @abstractmethod
    def bind_kv_cache(self, kv_dtype: KVCacheDtype) -> list[KVFormat]:
        """Choose how keys and values are stored; before the first `forward`. Returns each layer's layout on this rank.

        Raises ConfigError for a storage type that these heads cannot have.
        """

    @abstractmethod
    def forward(
        self, input_ids: Tensor, positions: Tensor, attention: AttentionMetadata, kv_caches: list[Tensor]
    ) -> Tensor:
        """Compute one step. input_ids, positions: [num_tokens] int64; kv_caches: one a layer, written in place.

        Returns hidden states [num_tokens, hidden_size] in the compute dtype. A token's row depends on its own
        request's tokens alone, to the bit.
        """

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size] → [num_rows, vocab_size] float32."""

    def weight_slots(self) -> dict[str, WeightSlot]:
        """What to load, by full name in the checkpoint."""
        return {name: slot for layer in self.layers() for name, slot in layer.weight_slots().items()}

    def finish_loading(self) -> None:
        """All required slots are loaded: bring every layer into its final form."""
        for layer in self.layers():
            layer.finish_loading()


MODELS: Registry[type[Model]] = Registry("model architecture", "servd.models")
