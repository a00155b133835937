"""Recorded steps: a replay computes from what lies in its inputs now, to the same bits as a fresh call.
Does not know any model: its steps are a few ops in a row."""

from collections.abc import Callable

import pytest
import torch
from servd_kernels import linear, native, rms_norm, silu_and_mul
from servd_kernels.recorder import Arena, NotRecordableError, Recorder, StepFailedError

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.missing_reason()))


def make_step(dtype: torch.dtype, rows: int = 5) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """x and a function of it: norm, a projection, the gate, a projection back, all added up four times."""
    torch.manual_seed(0)
    x = torch.randn(rows, 64).to(dtype)
    norm_weight = torch.rand(64).to(dtype)
    up = linear.pack(torch.randn(256, 64).to(dtype))
    down = linear.pack(torch.randn(64, 128).to(dtype))

    def step() -> torch.Tensor:
        residual = x
        hidden = rms_norm.rms_norm(x, norm_weight, 1e-5)
        for _ in range(4):
            wide = linear.linear(hidden, up).view(rows, 4, 64)
            out = linear.linear(silu_and_mul.silu_and_mul(wide.view(rows, 256)), down)
            hidden, residual = rms_norm.rms_norm(out, norm_weight, 1e-5, residual)
        return hidden

    return x, step


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_replay_reads_what_its_inputs_hold_now(isa: str, dtype: torch.dtype) -> None:
    native.select_isa(isa)
    try:
        x, step = make_step(dtype)
        expected = step()
        recording = Recorder()(step)
        assert torch.equal(recording.output, expected)
        for scale in (0.5, -3.0):
            x.mul_(scale).add_(1)
            assert torch.equal(recording.replay(), step())
    finally:
        native.select_isa(native.isas()[0])


@torch.inference_mode()
def test_a_recording_keeps_its_instruction_set() -> None:
    x, step = make_step(torch.float32)
    recording = Recorder()(step)
    expected = step()
    native.select_isa("portable")
    try:
        assert torch.equal(recording.replay(), expected)
    finally:
        native.select_isa(native.isas()[0])


@torch.inference_mode()
def test_recordings_of_one_recorder_do_not_disturb_each_other() -> None:
    record = Recorder()
    steps = [make_step(torch.float32, rows)[1] for rows in (1, 7, 3)]
    recordings = [record(step) for step in steps]
    for recording, step in [*zip(recordings, steps, strict=True)] * 2:
        assert torch.equal(recording.replay(), step())


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
    x = torch.ones(4, 4)

    def step() -> torch.Tensor:
        work(x)
        return x

    with pytest.raises(NotRecordableError, match="torch's"):
        Recorder()(step)


def test_functions_that_cannot_be_recorded_are_named() -> None:
    weight = torch.randn(8, 64)

    def step() -> torch.Tensor:
        linear.pack(weight)
        return weight

    with pytest.raises(NotRecordableError, match="linear_packed_size"):
        Recorder()(step)


@torch.inference_mode()
def test_a_fault_in_a_replay_is_reported() -> None:
    packed = linear.pack(torch.randn(8, 64))
    ids = torch.tensor([1, 3])
    recording = Recorder()(lambda: packed.rows(ids))
    assert torch.equal(recording.replay(), packed.rows(ids))
    ids[1] = 8
    with pytest.raises(StepFailedError, match="call 0 of 1"):
        recording.replay()


def test_kernels_work_as_ever_after_a_recording_that_failed() -> None:
    x, step = make_step(torch.float32)
    with torch.inference_mode():
        expected = step()
        with pytest.raises(NotRecordableError):
            Recorder()(lambda: step() + 1)
        assert torch.equal(step(), expected)


def test_an_arena_reuses_memory_that_nothing_holds() -> None:
    arena = Arena()
    first = arena.empty((4, 100), torch.float32)
    view = first[1:].flatten()
    del first
    second = arena.empty((4, 100), torch.float32)
    assert second.data_ptr() != view.data_ptr() - 400 and arena.num_bytes == 3200
    del view
    third = arena.empty((100,), torch.bfloat16)
    assert third.data_ptr() != second.data_ptr() and arena.num_bytes == 3200
    assert third.data_ptr() % 64 == 0 and arena.empty((0, 4), torch.float32).shape == (0, 4)
