"""The decoder that the Llama-like families share: attention and gated feed-forward with RMS norms before them.

Knows nothing of a family's config file beyond `DecoderConfig`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from servd_kernels.kv_format import KVFormat
from torch import Tensor

from servd.attention.key_observation import observe_keys
from servd.attention.kv_dtype import KVCacheDtype
from servd.attention.layer import Attention, reads_key_words
from servd.attention.metadata import AttentionMetadata
from servd.errors import ConfigError
from servd.layers.base import Layer, LayerContext
from servd.layers.embedding import LMHead, VocabEmbedding
from servd.layers.linear import GatedLinear, QKVParallelLinear, RowParallelLinear
from servd.layers.norm import RMSNorm
from servd.layers.rotary import RopeConfig, RotaryEmbedding
from servd.models.base import Model


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The dimensions and options of one model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int, ...]  # [num_layers] keys that a token sees; 0: all before it
    rope: RopeConfig


def read_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of config.json. Raises ConfigError naming the key."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} in config.json is {value!r}; allowed: a positive integer")
    return value


def read_number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive number of config.json. Raises ConfigError naming the key."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{key} in config.json is {value!r}; allowed: a positive number")
    return float(value)


def read_decoder_config(
    config: Mapping[str, Any],
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
    sliding_windows: tuple[int, ...] | None = None,
) -> DecoderConfig:
    """Read what all families name alike; the arguments are where they differ. Raises ConfigError."""
    num_layers, num_heads = read_int(config, "num_hidden_layers"), read_int(config, "num_attention_heads")
    num_kv_heads = read_int(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_key_value_heads is {num_kv_heads}; allowed: a divisor of the {num_heads} query heads")
    hidden_size = read_int(config, "hidden_size")
    head_dim = read_int(config, "head_dim", head_dim or hidden_size // num_heads)
    max_position_embeddings = read_int(config, "max_position_embeddings", 2048)
    return DecoderConfig(
        vocab_size=read_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read_int(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6),
        hidden_act=str(config.get("hidden_act", "silu")),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        sliding_windows=sliding_windows or (0,) * num_layers,
        rope=RopeConfig.from_hf(config, head_dim, max_position_embeddings),
    )


class _SelfAttention:
    def __init__(self, config: DecoderConfig, context: LayerContext, prefix: str, window: int, cos_sin: Tensor) -> None:
        self._qkv_proj = QKVParallelLinear(
            context,
            prefix,
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.qkv_bias,
        )
        self.num_kv_heads = self._qkv_proj.num_kv_heads
        self._heads = self._qkv_proj.num_heads
        self._key_end = self._heads + self.num_kv_heads
        self._head_dim = config.head_dim
        self._q_norm, self._k_norm = (
            RMSNorm(context, f"{prefix}.{name}", config.head_dim, config.rms_norm_eps) if config.qk_norm else None
            for name in ("q_norm", "k_norm")
        )
        self.attention = Attention(
            dtype=context.dtype,
            device=context.device,
            num_heads=self._heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=config.head_dim,
            cos_sin=cos_sin,
            sliding_window=window,
        )
        self._o_proj = RowParallelLinear(
            context, f"{prefix}.o_proj", config.num_heads * config.head_dim, config.hidden_size, bias=config.o_bias
        )

    def layers(self) -> Iterator[Layer]:
        yield self._qkv_proj
        if self._q_norm is not None and self._k_norm is not None:
            yield from (self._q_norm, self._k_norm)
        yield self._o_proj

    def __call__(self, hidden: Tensor, positions: Tensor, attention: AttentionMetadata, kv_cache: Tensor) -> Tensor:
        num_tokens = hidden.shape[0]
        qkv = self._qkv_proj(hidden).view(num_tokens, -1, self._head_dim)
        q, k, v = qkv[:, : self._heads], qkv[:, self._heads : self._key_end], qkv[:, self._key_end :]
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(q), self._k_norm(k)
        output = self.attention(q, k, v, positions, attention, kv_cache)
        return self._o_proj(output.view(num_tokens, -1))


class _FeedForward:
    def __init__(self, config: DecoderConfig, context: LayerContext, prefix: str) -> None:
        hidden_size, intermediate_size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self._gate_up_proj = GatedLinear(
            context,
            [f"{prefix}.gate_proj", f"{prefix}.up_proj"],
            hidden_size,
            intermediate_size,
            hidden_act=config.hidden_act,
            bias=bias,
        )
        self._down_proj = RowParallelLinear(context, f"{prefix}.down_proj", intermediate_size, hidden_size, bias=bias)

    def layers(self) -> Iterator[Layer]:
        yield from (self._gate_up_proj, self._down_proj)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._down_proj(self._gate_up_proj(hidden))


class _DecoderLayer:
    def __init__(self, config: DecoderConfig, context: LayerContext, index: int, cos_sin: Tensor) -> None:
        prefix = f"model.layers.{index}"
        self.self_attention = _SelfAttention(
            config, context, f"{prefix}.self_attn", config.sliding_windows[index], cos_sin
        )
        self._feed_forward = _FeedForward(config, context, f"{prefix}.mlp")
        self.input_norm = RMSNorm(context, f"{prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self._post_attention_norm = RMSNorm(
            context, f"{prefix}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps
        )

    def layers(self) -> Iterator[Layer]:
        yield self.input_norm
        yield from self.self_attention.layers()
        yield self._post_attention_norm
        yield from self._feed_forward.layers()

    def __call__(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        attention: AttentionMetadata,
        kv_cache: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Both [num_tokens, hidden_size]; the residual waits for the next norm, which adds it in one pass."""
        if residual is None:
            hidden, residual = self.input_norm(hidden), hidden
        else:
            hidden, residual = self.input_norm.add(hidden, residual)
        hidden = self.self_attention(hidden, positions, attention, kv_cache)
        hidden, residual = self._post_attention_norm.add(hidden, residual)
        return self._feed_forward(hidden), residual


class DecoderModel(Model):
    """A model that is a `DecoderConfig`; a family only says how to read its config.json."""

    def __init__(self, config: Mapping[str, Any], context: LayerContext) -> None:
        decoder = self.read_config(config)
        self._rotary = RotaryEmbedding(decoder.rope, context.device)
        self._embed_tokens = VocabEmbedding(context, "model.embed_tokens", decoder.vocab_size, decoder.hidden_size)
        self._layers = [
            _DecoderLayer(decoder, context, index, self._rotary.cos_sin) for index in range(decoder.num_layers)
        ]
        self._norm = RMSNorm(context, "model.norm", decoder.hidden_size, decoder.rms_norm_eps)
        self._lm_head = LMHead(
            context,
            "lm_head",
            decoder.vocab_size,
            decoder.hidden_size,
            tied_to=self._embed_tokens if decoder.tie_word_embeddings else None,
        )
        self._attentions = [layer.self_attention.attention for layer in self._layers]
        self.num_layers = decoder.num_layers
        self.num_kv_heads = self._layers[0].self_attention.num_kv_heads
        self.head_dim = decoder.head_dim
        self.hidden_size = decoder.hidden_size
        self.vocab_size = decoder.vocab_size
        self.max_position_embeddings = decoder.rope.max_position
        self.dtype = context.dtype
        self.device = context.device

    @classmethod
    @abstractmethod
    def read_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The family's reading of config.json. Raises ConfigError."""

    def bind_kv_cache(self, kv_dtype: KVCacheDtype) -> list[KVFormat]:
        formats = self._bind(kv_dtype)
        rotated = {f.k.code.group_size(f.head_dim) for f in formats if f.k.code.is_rotated}
        if rotated and not self._attentions[0].has_key_order:
            observe_keys(self, self._attentions, self._bind(kv_dtype.plain()), *rotated)
            self._bind(kv_dtype)
        return formats

    def _bind(self, kv_dtype: KVCacheDtype) -> list[KVFormat]:
        formats = kv_dtype.formats(
            self.num_layers, self.num_kv_heads, self.head_dim, self.dtype, key_words=reads_key_words(self.device)
        )
        for attention, kv_format in zip(self._attentions, formats, strict=True):
            attention.bind_kv_cache(kv_format)
        return formats

    def layers(self) -> Iterable[Layer]:
        yield from (self._rotary, self._embed_tokens)
        for layer in self._layers:
            yield from layer.layers()
        yield from (self._norm, self._lm_head)

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention: AttentionMetadata, kv_caches: list[Tensor]
    ) -> Tensor:
        hidden, residual = self._embed_tokens(input_ids), None
        for layer, kv_cache in zip(self._layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, positions, attention, kv_cache)
        assert residual is not None, "a model has at least one layer"
        return self._norm.add(hidden, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._lm_head(hidden)
