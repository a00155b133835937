"""Gated activations of the feed-forward layer, by their name in a model's config.

Knows nothing of the projections around them.
"""

from __future__ import annotations

from collections.abc import Callable

from servd_kernels import silu_and_mul
from torch import Tensor

from servd.errors import ConfigError
from servd.layers.base import LayerContext

_GATED_OPS = {"silu": silu_and_mul.OP}


def gated_activation(hidden_act: str, context: LayerContext, intermediate_size: int) -> Callable[[Tensor], Tensor]:
    """A function of [num_tokens, 2 * intermediate_size] (gate, up) → [num_tokens, intermediate_size].

    Raises ConfigError naming the known activations.
    """
    if hidden_act not in _GATED_OPS:
        raise ConfigError(f"hidden_act is {hidden_act!r}; allowed: {', '.join(_GATED_OPS)}")
    op = _GATED_OPS[hidden_act]
    bound: Callable[[Tensor], Tensor] = op.bind(
        device=context.device.type, dtype=context.dtype, width=intermediate_size
    )
    return bound
