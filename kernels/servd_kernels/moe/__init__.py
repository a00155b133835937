"""Owns the experts' feed-forward layers of a mixture (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538).
Does not know how tokens are routed (route), nor which ranks hold which experts."""

import torch

from servd_kernels.linear.packed import ACTIVATIONS
from servd_kernels.moe.packed import BoundMoe, PackedExperts
from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

__all__ = ["OP", "BoundMoe", "PackedExperts", "moe", "pack"]

OP = Op("moe")


def pack(gate_up: torch.Tensor, down: torch.Tensor, backend: str | None = None) -> PackedExperts:
    """The experts in the backend's own layout: gate_up [num_experts, 2 * intermediate, hidden], an expert's gate matrix
    above its up matrix, and down [num_experts, hidden, intermediate]; float32, bfloat16 or float16.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    if gate_up.dim() != 3 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [num_experts, 2 * intermediate, hidden], not {list(gate_up.shape)}")
    experts, double, hidden = gate_up.shape
    if down.shape != (experts, hidden, double // 2) or down.dtype != gate_up.dtype:
        wanted = f"{gate_up.dtype} {[experts, hidden, double // 2]} like gate_up"
        raise ValueError(f"down must be {wanted}, not {down.dtype} {list(down.shape)}")
    bound: BoundMoe = OP.bind(gate_up.device.type, gate_up.dtype, backend)  # type: ignore[assignment]
    return bound.pack(gate_up, down)


def moe(
    x: torch.Tensor,
    packed: PackedExperts,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str | None = "silu",
) -> torch.Tensor:
    """The sum over a token's slots of weight * expert(x), expert(x) = (activation(x G^T) * (x U^T)) D^T.

    x [tokens, hidden] (rows may be strided), of the packed weights' dtype; weights float32 and ids int32 [tokens,
    top_k], as `route` gives them; the result is [tokens, hidden]. A slot whose id is outside 0..num_experts - 1 adds
    nothing: its expert is another rank's. Activations: silu, gelu, gelu_tanh or None. Sums are in float32; the gated
    product rounds to the dtype once, and so does the result, after the slots were added in ascending order. A token's
    bits do not depend on the others. Raises ValueError for shapes, dtypes or an activation that do not fit.
    """
    if x.dim() != 2 or x.shape[1] != packed.hidden:
        raise ValueError(f"x must be [tokens, {packed.hidden}], not {list(x.shape)}")
    if x.dtype != packed.down.dtype:
        raise ValueError(f"x must be {packed.down.dtype} like the experts, not {x.dtype}")
    for name, tensor, dtype in (("weights", weights, torch.float32), ("ids", ids, torch.int32)):
        if tensor.dim() != 2 or len(tensor) != len(x) or tensor.shape[1] == 0 or tensor.dtype != dtype:
            wanted = f"{dtype} [{len(x)}, top_k]"
            raise ValueError(f"{name} must be {wanted}, not {tensor.dtype} {list(tensor.shape)}")
    if weights.shape != ids.shape:
        raise ValueError(f"weights must be {list(ids.shape)} like ids, not {list(weights.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(str, ACTIVATIONS))}, not {activation!r}")
    check_last_stride(x=x)
    return packed.run(x, packed, weights.contiguous(), ids.contiguous(), activation)
