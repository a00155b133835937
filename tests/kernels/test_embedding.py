"""Owns the tests of embedding.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels.embedding import OP, embedding, reference


@pytest.fixture
def name(backend: str) -> str:
    return "library" if backend == "triton" else backend  # the one that a GPU takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "rows", "hidden"), [(1, 1, 1), (7, 5, 33), (0, 4, 8), (300, 1000, 576)])
def test_rows_come_out_exact(name: str, count: int, rows: int, hidden: int, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(count, rows, hidden, dtype)
    out = embedding(inputs["ids"], inputs["table"], backend=name)
    assert out.is_contiguous() and torch.equal(out, inputs["table"][inputs["ids"]])


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_id_without_a_row_is_refused(name: str, wrong: int) -> None:
    with pytest.raises(IndexError):
        embedding(torch.tensor([0, wrong, 1]), torch.ones(5, 8), backend=name)


def test_wrong_arguments_are_named() -> None:
    table = torch.ones(5, 8)
    for ids, other, named in (
        (torch.tensor([1], dtype=torch.int32), table, "ids"),
        (torch.tensor([[1]]), table, "ids"),
        (torch.tensor([1]), table[0], "table"),
        (torch.tensor([1]), table.t(), "table"),
        (torch.arange(4)[::2], table, "ids"),
    ):
        with pytest.raises(ValueError, match=named):
            embedding(ids, other)


def test_a_gpu_gets_torchs_own_without_a_warning() -> None:
    assert OP.reason_against("library", "cuda") is None and OP.backends()[0] == "library"
