"""The worker in a thread of this process: offline use and debugging.

Knows nothing of the model; torch is imported by the thread that starts.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from servd.config import EngineConfig
from servd.errors import ServdError, StepFailedError, WorkerDied
from servd.executor.base import EXECUTORS, Executor, ProgressCallback
from servd.hub import ModelFiles
from servd.outputs import ModelRunnerOutput, SchedulerOutput, WorkerInfo

if TYPE_CHECKING:
    from servd.worker.worker import Worker


@EXECUTORS.register("inproc")
class InprocExecutor(Executor):
    """One thread, so that steps run in order and torch's thread settings hold for all of them."""

    def __init__(self, config: EngineConfig, files: ModelFiles | None = None) -> None:
        super().__init__(config, files)
        self._thread: ThreadPoolExecutor | None = None
        self._worker: Worker | None = None

    async def start(self, progress: ProgressCallback | None = None) -> WorkerInfo:
        files = await self.model_files()
        await self.close()
        loop = asyncio.get_running_loop()
        thread = self._thread = ThreadPoolExecutor(1, thread_name_prefix="servd-worker")

        def report(what: str, done: int, total: int) -> None:
            if progress is not None:
                loop.call_soon_threadsafe(progress, what, done, total)

        def load() -> Worker:
            from servd.worker.worker import Worker

            return Worker(self.config, files, report)

        try:
            worker = await loop.run_in_executor(thread, load)
        except ServdError:
            raise
        except Exception as error:
            raise WorkerDied(f"the worker could not start: {type(error).__name__}: {error}") from error
        if self._thread is not thread:
            raise WorkerDied("the worker was shut down while it started")
        self._worker = worker
        return worker.info()

    def submit(self, plan: SchedulerOutput) -> asyncio.Future[ModelRunnerOutput]:
        loop = asyncio.get_running_loop()
        if self._thread is None or self._worker is None:
            future: asyncio.Future[ModelRunnerOutput] = loop.create_future()
            future.set_exception(WorkerDied("the worker is not running"))
            return future
        return loop.run_in_executor(self._thread, _execute, self._worker, plan)

    async def close(self) -> None:
        thread, self._thread, self._worker = self._thread, None, None
        if thread is not None:
            # A step cannot be interrupted: wait for the one that runs, drop those behind it.
            await asyncio.to_thread(thread.shutdown, wait=True, cancel_futures=True)


def _execute(worker: Worker, plan: SchedulerOutput) -> ModelRunnerOutput:
    try:
        return worker.execute(plan)
    except Exception as error:
        raise StepFailedError(f"step {plan.step_id}: {type(error).__name__}: {error}") from error
