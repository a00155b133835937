"""Recorded steps: a replay computes from what lies in its inputs now, to the same bits as a fresh call.
Does not know any model: its steps are a few ops in a row."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from servd_kernels import linear, native, rms_norm, silu_and_mul
from servd_kernels.recorder import Arena, NotRecordableError, Recording, StepFailedError

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.missing_reason()))

MAX_ROWS = 40
Step = Callable[[int, int], torch.Tensor]


def make_step(dtype: torch.dtype) -> tuple[torch.Tensor, Step]:
    """x [MAX_ROWS, 64] and a function of its first rows: norm, projection, gate, projection back, four times."""
    torch.manual_seed(0)
    x = torch.randn(MAX_ROWS, 64).to(dtype)
    norm_weight = torch.rand(64).to(dtype)
    up = linear.pack(torch.randn(256, 64).to(dtype))
    down = linear.pack(torch.randn(64, 128).to(dtype))

    def step(rows: int, groups: int) -> torch.Tensor:
        residual = x[:rows]
        hidden = rms_norm.rms_norm(residual, norm_weight, 1e-5)
        for _ in range(4):
            wide = linear.linear(hidden, up).view(rows, 4, 64)
            out = linear.linear(silu_and_mul.silu_and_mul(wide.view(rows, 256)), down)
            hidden, residual = rms_norm.rms_norm(out, norm_weight, 1e-5, residual)
        return hidden

    return x, step


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_replay_of_any_size_reads_what_its_inputs_hold_now(isa: str, dtype: torch.dtype) -> None:
    native.select_isa(isa)
    try:
        x, step = make_step(dtype)
        recording = Recording(step, MAX_ROWS)
        for rows in (1, 2, 11, 39, MAX_ROWS, 3, 17):
            x.mul_(-0.9).add_(0.1)
            assert torch.equal(recording.replay(rows, 1), step(rows, 1))
    finally:
        native.select_isa(native.isas()[0])


@torch.inference_mode()
def test_a_recording_keeps_its_instruction_set() -> None:
    _, step = make_step(torch.float32)
    recording = Recording(step, MAX_ROWS)
    expected = step(7, 1)
    native.select_isa("portable")
    try:
        assert torch.equal(recording.replay(7, 1), expected)
    finally:
        native.select_isa(native.isas()[0])


@torch.inference_mode()
def test_replays_do_not_touch_the_memory_of_others() -> None:
    _, step = make_step(torch.float32)
    recording = Recording(step, MAX_ROWS)
    kept = recording.replay(5, 1).clone()
    others = [torch.full((64, 64), 3.0) for _ in range(200)]
    recording.replay(MAX_ROWS, 1)
    assert torch.equal(recording.replay(5, 1), kept)
    assert all(bool((other == 3).all()) for other in others)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x + 1,
        lambda x: x.add_(1),
        lambda x: x.t().contiguous(),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.sum().item(),
        lambda x: x.to(torch.float64),
        lambda x: torch.zeros(3),
        lambda x: x.__setitem__(0, 1.0),
    ],
)
def test_work_of_torchs_own_is_refused(work: Callable[[torch.Tensor], object]) -> None:
    x, step = make_step(torch.float32)

    def other(rows: int, groups: int) -> torch.Tensor:
        work(x[:4, :4])
        return step(rows, groups)

    with pytest.raises(NotRecordableError, match="torch's"):
        Recording(other, MAX_ROWS)


def test_functions_that_cannot_be_recorded_are_named() -> None:
    weight = torch.randn(8, 64)
    _, step = make_step(torch.float32)

    def other(rows: int, groups: int) -> torch.Tensor:
        linear.pack(weight)
        return step(rows, groups)

    with pytest.raises(NotRecordableError, match="linear_packed_size"):
        Recording(other, MAX_ROWS)


@pytest.mark.parametrize("scratch", [lambda rows: (2 * rows, 8), lambda rows: (8, rows), lambda rows: (rows // 2 + 1,)])
def test_memory_that_grows_otherwise_than_by_rows_is_refused(scratch: Callable[[int], tuple[int, ...]]) -> None:
    """A replay of more rows would write beyond it."""
    _, step = make_step(torch.float32)

    def other(rows: int, groups: int) -> torch.Tensor:
        torch.empty(scratch(rows))
        return step(rows, groups)

    with pytest.raises(NotRecordableError, match="memory"):
        Recording(other, MAX_ROWS)


def test_calls_that_depend_on_the_size_are_refused() -> None:
    _, step = make_step(torch.float32)

    def other(rows: int, groups: int) -> torch.Tensor:
        return step(rows if rows < 20 else 20, groups)

    with pytest.raises(NotRecordableError):
        Recording(other, MAX_ROWS)


def test_a_result_that_lies_elsewhere_or_is_part_of_a_tensor_is_refused() -> None:
    x, step = make_step(torch.float32)
    with pytest.raises(NotRecordableError, match="result"):
        Recording(lambda rows, groups: x[:rows], MAX_ROWS)
    with pytest.raises(NotRecordableError, match="result"):
        Recording(lambda rows, groups: step(rows, groups)[:, :32], MAX_ROWS)


@torch.inference_mode()
def test_sizes_without_memory_are_named() -> None:
    _, step = make_step(torch.float32)
    with pytest.raises(ValueError, match="max_rows is 28; allowed: at least 29"):
        Recording(step, 28)
    with pytest.raises(ValueError, match=f"rows is {MAX_ROWS + 1}; allowed: up to {MAX_ROWS}"):
        Recording(step, MAX_ROWS).replay(MAX_ROWS + 1, 1)


def test_memory_is_used_again_only_when_no_view_of_it_lives() -> None:
    arena = Arena(MAX_ROWS)
    first = arena.empty((4, 8), torch.float32)
    view = first[2:].view(-1)
    first_address, view_address = first.data_ptr(), view.data_ptr()
    del first
    second = arena.empty((4, 8), torch.float32)
    assert second.data_ptr() != first_address and view.data_ptr() == view_address
    del view
    assert arena.empty((4, 8), torch.float32).data_ptr() == first_address


@torch.inference_mode()
def test_what_other_threads_call_meanwhile_is_not_recorded() -> None:
    """Neither their kernels nor their recordings, which wait."""
    x, step = make_step(torch.float32)
    expected = step(7, 1)
    widths, recorded = iter(range(2, 1000, 2)), []

    def with_another_thread(rows: int, groups: int) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: silu_and_mul.silu_and_mul(torch.ones(3, next(widths)))).result()
        return step(rows, groups)

    def record() -> None:
        with torch.inference_mode():
            recorded.append(Recording(with_another_thread, MAX_ROWS).replay(7, 1))

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(result, expected) for result in recorded] == [True, True]
    assert torch.equal(step(7, 1), expected)


@torch.inference_mode()
def test_a_fault_in_a_replay_is_reported() -> None:
    packed = linear.pack(torch.randn(8, 64))
    ids = torch.arange(MAX_ROWS) % 8
    recording = Recording(lambda rows, groups: packed.rows(ids[:rows]), MAX_ROWS)
    assert torch.equal(recording.replay(3, 1), packed.rows(ids[:3]))
    ids[1] = 8
    with pytest.raises(StepFailedError, match="call 0 of 1"):
        recording.replay(2, 1)
    assert torch.equal(recording.replay(1, 1), packed.rows(ids[:1]))


@torch.inference_mode()
def test_kernels_work_as_ever_after_a_recording_that_failed() -> None:
    _, step = make_step(torch.float32)
    expected = step(5, 1)
    with pytest.raises(NotRecordableError):
        Recording(lambda rows, groups: step(rows, groups) + 1, MAX_ROWS)
    assert torch.equal(step(5, 1), expected)
