"""The worker in a process of its own: started early, watched, replaced when it dies.

Owns processes and the futures of steps. Knows nothing of models; the front process never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from servd.config import EngineConfig
from servd.errors import ConfigError, StepFailedError, WorkerDied
from servd.executor import protocol
from servd.executor.base import EXECUTORS, Executor, ProgressCallback
from servd.executor.shm_channel import ChannelClosed, ShmChannel
from servd.hub import ModelFiles
from servd.outputs import ModelRunnerOutput, SchedulerOutput, WorkerInfo

logger = logging.getLogger(__name__)

EXIT_SECONDS = 5.0  # what a worker gets to leave when asked
DEATH_SECONDS = 1.0  # what a worker gets to end after it closed its channel
POLL_SECONDS = 0.005
LOG_LEVELS = ((logging.DEBUG, "debug"), (logging.INFO, "info"), (logging.WARNING, "warning"))


class _Rank:
    """One worker process and this side of its channel."""

    def __init__(self, index: int, module: str) -> None:
        self.index = index
        self.channel, fds = ShmChannel.create()
        try:
            self.process = subprocess.Popen(
                # -P: the current folder is on the path because it is on ours, or not at all.
                [sys.executable, "-P", "-m", module, *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in the terminal is for the front, which drains first
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        except BaseException:
            self.channel.close()
            raise
        finally:
            for fd in fds:  # only the worker may hold these, or its death would not close the channel
                os.close(fd)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writing = False

    def attach(
        self,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[_Rank, protocol.ToFront], None],
        on_death: Callable[[_Rank], None],
    ) -> None:
        """Call back on `loop` for each message, and once when there will be no more."""
        self._loop, self._on_message, self._on_death = loop, on_message, on_death
        loop.add_reader(self.channel.fileno(), self._readable)

    def detach(self) -> None:
        """No more callbacks."""
        if self._loop is not None:
            self._loop.remove_reader(self.channel.fileno())
            self._watch_writable(False)
            self._loop = None

    def send(self, message: bytes) -> None:
        """Send an encoded message. Never blocks; a dead worker shows as its death."""
        self.channel.send(message)
        self._watch_writable(self.channel.wants_write)

    def free(self) -> None:
        """Let go of the channel; the process must be gone."""
        assert self.process.returncode is not None, f"worker process {self.process.pid} still runs"
        self.detach()
        self.channel.close()

    def describe_exit(self) -> str:
        """How the process ended, for people."""
        code = self.process.returncode
        if code >= 0:
            return f"worker process {self.process.pid} exited with status {code}"
        hint = " (perhaps for want of memory)" if -code == signal.SIGKILL else ""
        return f"worker process {self.process.pid} was killed by {signal.Signals(-code).name}{hint}"

    async def exited(self, seconds: float) -> bool:
        """Wait so long for the process to end; whether it has."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self.process.poll() is None:
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    def _readable(self) -> None:
        try:
            for message in self.channel.receive():
                self._on_message(self, protocol.decode_to_front(message))
        except ChannelClosed:
            self.detach()
            self._on_death(self)
        except Exception:  # whatever it sent, no step of this worker can be believed any more
            logger.exception("worker process %d sent something wrong", self.process.pid)
            self.process.kill()
            self.detach()
            self._on_death(self)
        else:
            self._watch_writable(self.channel.wants_write)

    def _writable(self) -> None:
        self.channel.on_writable()
        self._watch_writable(self.channel.wants_write)

    def _watch_writable(self, wanted: bool) -> None:
        if self._loop is None or wanted == self._writing:
            return
        self._writing = wanted
        if wanted:
            self._loop.add_writer(self.channel.fileno(), self._writable)
        else:
            self._loop.remove_writer(self.channel.fileno())


@EXECUTORS.register("multiproc")
class MultiprocExecutor(Executor):
    """A worker process for each rank (one for now); results are taken from rank 0, death from any."""

    worker_module: ClassVar[str] = "servd.worker"

    def __init__(self, config: EngineConfig, files: ModelFiles | None = None) -> None:
        super().__init__(config, files)
        self._ranks: list[_Rank] = []
        self._pending: deque[tuple[int, asyncio.Future[ModelRunnerOutput]]] = deque()
        self._starting: asyncio.Future[WorkerInfo] | None = None
        self._progress: ProgressCallback | None = None
        self._is_ready = False
        self._burial: asyncio.Task[None] | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run, by rank."""
        return [rank.process.pid for rank in self._ranks]

    def launch(self) -> None:
        if not self._ranks:
            self._ranks = [_Rank(0, self.worker_module)]

    async def start(self, progress: ProgressCallback | None = None) -> WorkerInfo:
        if self._burial is not None:
            await self._burial
        assert not self._is_ready, "the workers run already"
        self.launch()
        try:
            files = await self.model_files()
            loop = asyncio.get_running_loop()
            self._starting, self._progress = loop.create_future(), progress
            level = logging.getLogger("servd").getEffectiveLevel()
            log_level = next((name for limit, name in LOG_LEVELS if level <= limit), "error")
            message = protocol.encode(protocol.Start(self.config, protocol.WireModelFiles.of(files), log_level))
            for rank in self._ranks:
                rank.attach(loop, self._on_message, self._on_death)
                rank.send(message)
            info = await self._starting
        except BaseException:
            await self.close()
            raise
        finally:
            self._starting = self._progress = None
        self._is_ready = True
        return info

    def submit(self, plan: SchedulerOutput) -> asyncio.Future[ModelRunnerOutput]:
        future: asyncio.Future[ModelRunnerOutput] = asyncio.get_running_loop().create_future()
        if not self._is_ready:
            future.set_exception(WorkerDied("the worker is not running"))
            return future
        message = protocol.encode(protocol.Step(plan))
        self._pending.append((plan.step_id, future))
        for rank in self._ranks:
            rank.send(message)
        return future

    async def kill(self) -> bool:
        if self._burial is not None:
            await self._burial  # they have just died by themselves
            return True
        ranks, self._ranks, self._is_ready = self._ranks, [], False
        for rank in ranks:
            rank.detach()
            rank.process.kill()  # also ends one that is stopped
        try:
            for rank in ranks:
                await rank.exited(EXIT_SECONDS)
        finally:
            _kill(ranks)
            self._fail(WorkerDied("the worker was killed"))
        return True

    async def close(self) -> None:
        if self._burial is not None:
            await self._burial
        was_ready, self._is_ready = self._is_ready, False
        ranks, self._ranks = self._ranks, []
        try:
            for rank in ranks:
                rank.detach()
                if was_ready:
                    rank.send(protocol.encode(protocol.Shutdown()))
                else:
                    rank.process.kill()  # it is loading, and would not hear
            for rank in ranks:
                await rank.exited(EXIT_SECONDS)
        finally:
            _kill(ranks)
            self._fail(WorkerDied("the worker was shut down"))

    def _on_message(self, rank: _Rank, message: protocol.ToFront) -> None:
        if rank.index != 0:
            return
        match message:
            case protocol.Progress(what, done, total):
                if self._progress is not None:
                    self._progress(what, done, total)
            case protocol.Ready(info):
                if self._starting is not None and not self._starting.done():
                    self._starting.set_result(info)
            case protocol.StartFailed(text, is_config_error):
                error = ConfigError(text) if is_config_error else WorkerDied(f"the worker could not start: {text}")
                if self._starting is not None and not self._starting.done():
                    self._starting.set_exception(error)
            case protocol.StepResult(output):
                future = self._take(output.step_id)
                if not future.done():  # the caller may have cancelled it
                    future.set_result(output)
            case protocol.StepFailed(step_id, text):
                future = self._take(step_id)
                if not future.done():
                    future.set_exception(StepFailedError(f"step {step_id}: {text}"))

    def _take(self, step_id: int) -> asyncio.Future[ModelRunnerOutput]:
        expected, future = self._pending.popleft()
        assert step_id == expected, f"step {step_id} was answered, step {expected} comes first"
        return future

    def _on_death(self, rank: _Rank) -> None:
        if self._burial is None:
            self._burial = asyncio.get_running_loop().create_task(self._bury(rank), name="servd-bury-worker")

    async def _bury(self, rank: _Rank) -> None:
        """A rank is lost: learn why, and end the others."""
        ranks, self._ranks = self._ranks, []
        was_starting, self._is_ready = not self._is_ready, False
        try:
            if not await rank.exited(DEATH_SECONDS):
                rank.process.kill()
                rank.process.wait()
        finally:
            _kill(ranks)
            self._burial = None
            error = WorkerDied(f"{rank.describe_exit()}{' while it started' if was_starting else ''}")
            was_idle = not was_starting and not self._pending
            self._fail(error)
            if was_idle and self.on_idle_death is not None:
                self.on_idle_death(error)

    def _fail(self, error: WorkerDied) -> None:
        """Tell everybody who waits."""
        if self._starting is not None and not self._starting.done():
            self._starting.set_exception(error)
        while self._pending:
            _, future = self._pending.popleft()
            if not future.done():
                future.set_exception(error)


def _kill(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
            rank.process.wait()
        rank.free()
