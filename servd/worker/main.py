"""The worker process: receive a plan, execute it, send the result; leave when the front process is gone.

Owns the process's signals and its end. Knows nothing of models; torch is imported while the front is still starting.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from servd.config import EngineConfig
from servd.errors import ConfigError
from servd.executor import protocol
from servd.executor.base import ProgressCallback
from servd.executor.shm_channel import ChannelClosed, ShmChannel
from servd.hub import ModelFiles
from servd.log import setup_logging
from servd.outputs import ModelRunnerOutput, SchedulerOutput, WorkerInfo

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1


class PlanRunner(Protocol):
    """What this process needs of a worker."""

    def info(self) -> WorkerInfo:
        """What it can do."""

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""


LoadWorker = Callable[[EngineConfig, ModelFiles, ProgressCallback], PlanRunner]


def import_worker() -> LoadWorker:
    """The real worker; importing it imports torch, the longest part of a start."""
    from servd.worker.worker import Worker

    return Worker


def main(fds: Sequence[str], get_loader: Callable[[], LoadWorker] = import_worker) -> int:
    """Serve the channel that `fds` describe until the front process ends it. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's to handle; it shuts this process down
    channel = ShmChannel.from_fds(*map(int, fds))
    _exit_with_front(channel)
    try:
        return _serve(channel, get_loader)
    except ChannelClosed:
        return 0


def _serve(channel: ShmChannel, get_loader: Callable[[], LoadWorker]) -> int:
    messages = _messages(channel)
    try:
        load = get_loader()
        start = next(messages)
        if not isinstance(start, protocol.Start):
            return 0  # told to shut down before it began
        setup_logging(start.log_level)

        def progress(what: str, done: int, total: int) -> None:
            _send(channel, protocol.Progress(what, done, total))

        worker = load(start.config, start.files.to_model_files(), progress)
        ready = protocol.Ready(worker.info())
    except ChannelClosed:
        raise
    except Exception as error:
        is_config_error = isinstance(error, ConfigError)
        if not is_config_error:
            logger.exception("the worker cannot start")
        message = str(error) if is_config_error else f"{type(error).__name__}: {error}"
        _send(channel, protocol.StartFailed(message, is_config_error))
        return 1
    gc.collect()
    gc.freeze()  # the model's modules live as long as the process: no full collection need look at them again
    _send(channel, ready)
    for step in messages:
        if not isinstance(step, protocol.Step):
            return 0
        _send(channel, _execute(worker, step.plan))
    return 0


def _execute(worker: PlanRunner, plan: SchedulerOutput) -> protocol.ToFront:
    try:
        return protocol.StepResult(worker.execute(plan))
    except Exception as error:
        logger.exception("step %d failed", plan.step_id)
        return protocol.StepFailed(plan.step_id, f"{type(error).__name__}: {error}")


def _messages(channel: ShmChannel) -> Iterator[protocol.ToWorker]:
    while True:
        for message in channel.wait():
            yield protocol.decode_to_worker(message)


def _send(channel: ShmChannel, message: protocol.ToFront) -> None:
    channel.send(protocol.encode(message))
    channel.flush()


def _exit_with_front(channel: ShmChannel) -> None:
    """End this process when the front ends, whatever this one is doing then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch(fd: int) -> None:
        poll = select.poll()
        poll.register(fd, 0)  # a hang-up is always reported
        poll.poll()
        os._exit(0)

    # The channel may be closed, and its descriptor's number reused, while the thread looks at it: watch a copy.
    threading.Thread(target=watch, args=(os.dup(channel.fileno()),), daemon=True, name="watch-front").start()
