"""Owns the Triton routing: one program a token, its experts in registers.
Does not know the experts."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from servd_kernels.triton_support import POINTERS, CompileCase, unsupported

MAX_EXPERTS = 1024  # in the registers of one program


def supports(device: str, dtype: torch.dtype, num_experts: int = 1, **axes: object) -> str | None:
    if num_experts > MAX_EXPERTS:
        return f"num_experts must be at most {MAX_EXPERTS}, not {num_experts}"
    return unsupported(device, dtype)


@triton.jit
def _ordered(value):
    """float32 -> int64 in the same order; NaN is above all, and the two zeros are one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value == value, key, 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _kernel(
    logits, bias, weights, ids, row_stride, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, IS_SIGMOID: tl.constexpr, RENORMALIZES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < num_experts
    values = tl.load(logits + token * row_stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    if IS_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(tl.minimum(-values, 88.0)))
    else:
        scores = tl.exp(values - tl.max(values, 0))
        scores = scores / tl.sum(scores, 0)
    choice = values
    if bias is not None:
        choice = scores + tl.load(bias + expert, mask=inside, other=0.0)
    # The expert in the low half makes keys unique: of equal choices the lower id is the greater.
    lowest: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    key = tl.where(inside, _ordered(choice) * 4096 + (4095 - expert), lowest)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([SLOTS], tl.float32)
    which = tl.zeros([SLOTS], tl.int32)
    for i in range(TOP_K):
        best = tl.max(key, 0)
        is_best = key == best
        chosen = tl.where(slot == i, tl.sum(tl.where(is_best, scores, 0.0), 0), chosen)
        which = tl.where(slot == i, tl.sum(tl.where(is_best, expert, 0), 0), which)
        key = tl.where(is_best, lowest, key)
    if RENORMALIZES:
        total = tl.sum(chosen, 0)
        chosen = chosen / tl.where(total < 1e-20, 1e-20, total)
    place = token * TOP_K + slot
    tl.store(weights + place, chosen, mask=slot < TOP_K)
    tl.store(ids + place, which, mask=slot < TOP_K)


def run(
    logits: torch.Tensor, top_k: int, renormalize: bool, scoring: str = "softmax", bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, experts = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    weights = torch.empty(tokens, top_k, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if tokens:
        _kernel[(tokens,)](
            logits, bias, weights, ids, logits.stride(0), experts,
            TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k), IS_SIGMOID=scoring == "sigmoid",
            RENORMALIZES=renormalize, BLOCK=triton.next_power_of_2(experts), num_warps=1,
        )  # fmt: skip
    return weights, ids


def compile_cases() -> Iterator[CompileCase]:
    for name, experts, top_k, is_sigmoid, bias in (
        ("Mixtral-8x7B", 8, 2, False, None),
        ("Qwen3-30B-A3B", 128, 8, False, None),
        ("DeepSeek-V3", 256, 8, True, "*fp32"),
    ):
        pointers = {"logits": POINTERS[torch.bfloat16], "weights": "*fp32", "ids": "*i32"}
        pointers |= {"bias": bias} if bias else {}
        yield CompileCase(
            name=name,
            kernel=_kernel,
            signature=pointers | {"row_stride": "i32", "num_experts": "i32"},
            constants={
                "TOP_K": top_k, "SLOTS": top_k, "IS_SIGMOID": is_sigmoid, "RENORMALIZES": True, "BLOCK": experts,
            } | ({} if bias else {"bias": None}),
            num_warps=1,
        )  # fmt: skip
