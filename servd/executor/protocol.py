"""The messages between the front process and a worker process, as typed msgpack.

Owns their encoding. Knows nothing of how bytes travel; importing it does not import torch.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from servd.config import EngineConfig
from servd.hub import ModelFiles
from servd.outputs import ModelRunnerOutput, SchedulerOutput, WorkerInfo


class WireModelFiles(msgspec.Struct, array_like=True):
    """ModelFiles with paths as text."""

    name: str
    folder: str
    weights: list[str]
    tensor_index: str | None
    recommended_sampling: dict[str, float]
    recommended_quantization: str | None

    @classmethod
    def of(cls, files: ModelFiles) -> WireModelFiles:
        """For sending."""
        return cls(
            files.name,
            str(files.folder),
            [str(path) for path in files.weights],
            None if files.tensor_index is None else str(files.tensor_index),
            dict(files.recommended_sampling),
            files.recommended_quantization,
        )

    def to_model_files(self) -> ModelFiles:
        """As received: equal to what was sent."""
        return ModelFiles(
            self.name,
            Path(self.folder),
            tuple(Path(path) for path in self.weights),
            None if self.tensor_index is None else Path(self.tensor_index),
            self.recommended_sampling,
            self.recommended_quantization,
        )


class Start(msgspec.Struct, tag=True, array_like=True):
    """Load the model; answered by Progress messages, then Ready or StartFailed."""

    config: EngineConfig
    files: WireModelFiles
    log_level: str


class Step(msgspec.Struct, tag=True, array_like=True):
    """Execute a plan; answered by StepResult or StepFailed, in order."""

    plan: SchedulerOutput


class Shutdown(msgspec.Struct, tag=True, array_like=True):
    """Exit; not answered."""


class Progress(msgspec.Struct, tag=True, array_like=True):
    """How far start-up is."""

    what: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True, array_like=True):
    """The worker takes plans now."""

    info: WorkerInfo


class StartFailed(msgspec.Struct, tag=True, array_like=True):
    """The worker cannot start, and exits."""

    message: str
    is_config_error: bool  # the user's to mend, in one line; else the worker has logged a traceback


class StepResult(msgspec.Struct, tag=True, array_like=True):
    """A step that was computed."""

    output: ModelRunnerOutput


class StepFailed(msgspec.Struct, tag=True, array_like=True):
    """A step that raised; the worker goes on."""

    step_id: int
    message: str


ToWorker = Start | Step | Shutdown
ToFront = Progress | Ready | StartFailed | StepResult | StepFailed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode
