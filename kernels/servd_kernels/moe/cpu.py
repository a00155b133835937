"""Owns the call of the native experts and the memory of their packed weights.
Does not know the layout (common/dense_panels.hpp): linear's functions pack each expert."""

import torch

from servd_kernels import native
from servd_kernels.linear.packed import ACTIVATIONS
from servd_kernels.moe.packed import BoundMoe, PackedExperts

_SIZE = native.Function("linear_packed_size", "lli", "l")
_PACK = native.Function("linear_pack", "plplllli")
_KERNEL = native.Function("moe", "plppppplllllii")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundMoe:
    return BoundMoe(pack, run)


def pack(gate_up: torch.Tensor, down: torch.Tensor) -> PackedExperts:
    experts, hidden, intermediate = down.shape
    return PackedExperts(
        _pack(gate_up, intermediate, 2), _pack(down, hidden, 1), experts, hidden, intermediate, run, _KERNEL.pinned()
    )


def _pack(weight: torch.Tensor, rows: int, parts: int) -> torch.Tensor:
    """weight [experts, parts * rows, depth] -> [experts, packed]; the panels of the parts alternate."""
    weight, code, depth = weight.contiguous(), native.DTYPES[weight.dtype], weight.shape[2]
    data = torch.empty(len(weight), parts * _SIZE.call(rows, depth, code), dtype=weight.dtype)
    for expert, target in zip(weight, data, strict=True):
        for part in range(parts):
            source = expert[part * rows :]
            _PACK.call(source.data_ptr(), depth, target.data_ptr(), rows, depth, part, parts, code)
    return data


def run(
    x: torch.Tensor,
    packed: PackedExperts,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str | None = "silu",
) -> torch.Tensor:
    assert packed.kernel is not None, "the experts were packed by another backend"
    tokens, top_k = ids.shape
    out = torch.empty(tokens, packed.hidden, dtype=x.dtype)
    packed.kernel.call(
        x.data_ptr(), x.stride(0), packed.gate_up.data_ptr(), packed.down.data_ptr(), weights.data_ptr(),
        ids.data_ptr(), out.data_ptr(), tokens, top_k, packed.num_experts, packed.hidden, packed.intermediate,
        ACTIVATIONS[activation], native.DTYPES[x.dtype],
    )  # fmt: skip
    return out
