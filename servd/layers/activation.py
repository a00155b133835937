"""Activations of the feed-forward layer, with and without a gate, by their name in a model's config.

Knows nothing of the projections around them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from servd_kernels import Op, gelu, gelu_and_mul, silu_and_mul
from torch import Tensor

from servd.errors import ConfigError
from servd.layers.base import LayerContext

# The form of GELU by each name that `transformers` gives to it.
_GELU_FORMS = {"gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}

_Choices = Mapping[str, tuple[Op, dict[str, Any]]]  # the op, and how it is called
_PLAIN: _Choices = {name: (gelu.OP, {"approximate": form}) for name, form in _GELU_FORMS.items()}
_GATED: _Choices = {
    "silu": (silu_and_mul.OP, {}),
    "swish": (silu_and_mul.OP, {}),
    **{name: (gelu_and_mul.OP, {"approximate": form}) for name, form in _GELU_FORMS.items()},
}


def gated_activation(hidden_act: str, context: LayerContext, intermediate_size: int) -> Callable[[Tensor], Tensor]:
    """A function of [num_tokens, 2 * intermediate_size] (gate, up) → [num_tokens, intermediate_size].

    Raises ConfigError naming the known activations.
    """
    return _bound(_GATED, hidden_act, context, intermediate_size)


def activation(hidden_act: str, context: LayerContext, intermediate_size: int) -> Callable[[Tensor], Tensor]:
    """A function of [num_tokens, intermediate_size] → the same shape. Raises ConfigError naming the known ones."""
    return _bound(_PLAIN, hidden_act, context, intermediate_size)


def epilogue(hidden_act: str) -> str:
    """The activation by the name that linear kernels have for it. Raises ConfigError naming the known ones."""
    _check(_GATED, hidden_act)
    if hidden_act in _GELU_FORMS:
        return "gelu" if _GELU_FORMS[hidden_act] == "none" else "gelu_tanh"
    return "silu"


def _check(choices: _Choices, hidden_act: str) -> None:
    if hidden_act not in choices:
        raise ConfigError(f"hidden_act is {hidden_act!r}; allowed: {', '.join(choices)}")


def _bound(choices: _Choices, hidden_act: str, context: LayerContext, width: int) -> Callable[[Tensor], Tensor]:
    _check(choices, hidden_act)
    op, options = choices[hidden_act]
    run: Callable[..., Tensor] = op.bind(device=context.device.type, dtype=context.dtype, width=width)
    return partial(run, **options) if options else run
