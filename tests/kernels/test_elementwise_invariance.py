"""Owns the tests that norms and activations give a row the same bits in any batch, place and number of threads.
Does not know how a backend achieves it; linear and attention are in test_invariance.py."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from servd_kernels import native
from servd_kernels.gelu import gelu
from servd_kernels.gelu_and_mul import gelu_and_mul
from servd_kernels.layer_norm import layer_norm
from servd_kernels.rms_norm import rms_norm
from servd_kernels.silu_and_mul import silu_and_mul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, WIDTH = 64, 578

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
FUNCTIONS: dict[str, Callable[..., Result]] = {
    "rms_norm": lambda x, gain, backend: rms_norm(x, gain, 1e-5, backend=backend),
    "rms_norm and residual": lambda x, gain, backend: rms_norm(x, gain, 1e-5, x.flip(1), backend=backend),
    "layer_norm": lambda x, gain, backend: layer_norm(x, gain, gain, 1e-5, backend=backend),
    "silu_and_mul": lambda x, gain, backend: silu_and_mul(x, backend=backend),
    "silu_and_mul to int8": lambda x, gain, backend: silu_and_mul(x, torch.int8, backend=backend),
    "gelu": lambda x, gain, backend: gelu(x, backend=backend),
    "gelu_and_mul": lambda x, gain, backend: gelu_and_mul(x, "tanh", backend=backend),
    "gelu_and_mul to e4m3": lambda x, gain, backend: gelu_and_mul(x, out_dtype=torch.float8_e4m3fn, backend=backend),
}


def function_of(name: str, backend: str, dtype: torch.dtype) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """The op, its results as tensors that can be compared and joined."""
    call = partial(FUNCTIONS[name], gain=torch.linspace(0.5, 1.5, WIDTH).to(dtype), backend=backend)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        result = call(x)
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        return [tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor for tensor in tensors]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_alone_in_a_few_and_elsewhere(backend: str, name: str, dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    run = function_of(name, backend, dtype)
    whole = run(x)
    for size in (1, 7, 9, 33):
        parts = [torch.cat(tensors) for tensors in zip(*map(run, x.split(size)), strict=True)]
        assert all(map(torch.equal, parts, whole)), f"in parts of {size}"
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(moved, tensor[order]) for moved, tensor in zip(run(x[order]), whole, strict=True))


@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in native.isas()], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_change_nothing(backend: str, restore_threads: None, name: str, dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    run = function_of(name, backend, dtype)
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        results.append(run(x))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
