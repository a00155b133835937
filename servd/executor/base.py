"""The one seam between engine and workers: start, submit, close.

Knows nothing of how a step is computed; importing it does not import torch.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from servd.config import EngineConfig
from servd.errors import WorkerDied
from servd.hub import ModelFiles, resolve_model
from servd.outputs import ModelRunnerOutput, SchedulerOutput, WorkerInfo
from servd.registry import Registry

ProgressCallback = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


class Executor(ABC):
    """Runs plans, in the order of submission, on one or more ranks.

    `config` and `files` may be replaced until `start()`. Without `files`, they are those of `config.model.model`.
    """

    def __init__(self, config: EngineConfig, files: ModelFiles | None = None) -> None:
        self.config = config
        self.files = files
        # Called if the workers die while no step is pending, so that no future can tell of it.
        self.on_idle_death: Callable[[WorkerDied], None] | None = None

    def launch(self) -> None:  # noqa: B027 - a hook, not a duty: only an executor with processes gains by it
        """Begin, without waiting, what needs neither `config` nor `files`, such as torch's import in the worker.

        Optional; `start()` does it otherwise. Call it from a thread that lives as long as the workers shall.
        """

    @abstractmethod
    async def start(self, progress: ProgressCallback | None = None) -> WorkerInfo:
        """Load the model and allocate the KV cache. May be called again after the workers died.

        Raises ConfigError if the model or a flag is wrong (the worker's own message), WorkerDied if a rank dies.
        """

    @abstractmethod
    def submit(self, plan: SchedulerOutput) -> asyncio.Future[ModelRunnerOutput]:
        """Queue a step. Results come in order; if a rank dies, every pending future gets WorkerDied.

        A step that raises in the worker gives StepFailedError: the worker lives on, and has taken in the plan's changes
        to requests and blocks, but not the tokens that the step would have sampled.
        """

    async def kill(self) -> bool:
        """End workers that do not answer, at once; every pending future gets WorkerDied, and `start()` may follow.

        False where that cannot be done, as with a thread: they may then take as long as they like.
        """
        return False

    @abstractmethod
    async def close(self) -> None:
        """Stop the workers and free what they hold. Safe to call twice, and after a death."""

    async def model_files(self) -> ModelFiles:
        """`files`, looked up off the event loop if they were not given. Raises ConfigError."""
        if self.files is None:
            self.files = await asyncio.to_thread(resolve_model, self.config.model.model)
        return self.files


EXECUTORS: Registry[type[Executor]] = Registry("executor", "servd.executor")
