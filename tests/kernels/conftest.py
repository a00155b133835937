"""Owns the fixtures that run a test on every backend, and on every instruction set of the native one.
Does not know any op."""

import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined; without a GPU its interpreter is the test

import pytest
import torch
from servd_kernels import native

VARIANTS = ["reference", "triton", *(f"cpu-{isa}" for isa in native.isas())]


@pytest.fixture(autouse=True, scope="package")
def one_torch_thread() -> Iterator[None]:
    """Torch only computes small references here; on a busy machine its threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=VARIANTS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend; the native one comes once for each instruction set of this processor."""
    name, _, isa = request.param.partition("-")
    if isa:
        native.select_isa(isa)
    yield name
    if isa:
        native.select_isa(native.isas()[0])


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    threads = native.num_threads()
    yield
    native.set_num_threads(threads)
