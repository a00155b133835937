"""Owns the call of the native paged attention.
Does not know its schedule (cpu.cpp) or arithmetic (span.hpp and what it includes)."""

import torch

from servd_kernels import native
from servd_kernels.kv_format import KVFormat
from servd_kernels.paged_attention.faults import FAULTS
from servd_kernels.paged_attention.options import PLAIN, AttentionOptions

_KERNEL = native.Function("paged_attention", "ppllipl" + "ppp" + "llllf" + "pl" + "pp" + "lllf" + "pp")
_MAX_HEAD_DIM = 256  # kMaxHeadDim of call.hpp


def supports(device: str, dtype: torch.dtype, *, kv_format: KVFormat, **axes: object) -> str | None:
    if kv_format.head_dim > _MAX_HEAD_DIM:
        return f"head_dim must be at most {_MAX_HEAD_DIM}, not {kv_format.head_dim}"
    return native.unsupported(device, dtype)


def run(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_format: KVFormat,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    options: AttentionOptions = PLAIN,
    pages: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    num_tokens, q_heads, head_dim = q.shape
    num_reqs, max_blocks = block_tables.shape
    q_token, q_head, _ = q.stride()
    if not block_tables.is_contiguous():
        block_tables = block_tables.contiguous()
    out = torch.empty(num_tokens, q_heads, head_dim, dtype=q.dtype)
    lse = torch.empty(num_tokens, q_heads) if return_lse else None
    fault = _KERNEL.call(
        kv_format.native_layout.data_ptr(), q.data_ptr(), q_token, q_head, native.DTYPES[q.dtype],
        kv_cache.data_ptr(), len(kv_cache),
        cu_seqlens_q.data_ptr(), seq_lens.data_ptr(), block_tables.data_ptr(),
        max_blocks, num_reqs, num_tokens, q_heads, scale,
        _pointer(pages), 0 if pages is None else pages.shape[2], out.data_ptr(), _pointer(lse),
        options.sliding_window, options.num_sink_tokens, options.logn_train_len, options.logit_softcap,
        _pointer(options.alibi_slopes), _pointer(options.sink_logits),
    )  # fmt: skip
    if fault:
        raise ValueError(FAULTS[fault])
    return out if lse is None else (out, lse)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
