"""A worker process without a model, behind the real process loop: it answers each plan at once.

Plans steer it through the first dropped request id: "raise", "hang", "exit 3", "kill".
"""

from __future__ import annotations

import os
import signal
import sys
import time

from servd.config import EngineConfig
from servd.errors import ConfigError
from servd.executor.base import ProgressCallback
from servd.hub import ModelFiles
from servd.outputs import ModelRunnerOutput, SchedulerOutput, WorkerInfo
from servd.worker.main import main


class EchoWorker:
    def __init__(self, config: EngineConfig, files: ModelFiles, progress: ProgressCallback) -> None:
        progress("loading", 1, 2)
        progress("loading", 2, 2)
        match files.name:
            case "wrong":
                raise ConfigError("--dtype is float8; allowed: float32")
            case "broken":
                raise RuntimeError("no such thing")
            case "slow":
                time.sleep(60)
            case "dies":
                os._exit(7)
        self.name = files.name
        self.block_size = config.cache.block_size

    def info(self) -> WorkerInfo:
        return WorkerInfo(self.name, "float32", 10, self.block_size, "echo")

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        order = plan.dropped_request_ids[0] if plan.dropped_request_ids else ""
        if order == "raise":
            raise ValueError("as asked")
        if order == "hang":
            time.sleep(60)
        if order.startswith("exit"):
            os._exit(int(order.split()[1]))
        if order == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        scheduled = plan.scheduled
        return ModelRunnerOutput(
            plan.step_id, scheduled.request_ids, scheduled.num_scheduled_tokens, {}, {}, {}, compute_seconds=0.0
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], lambda: EchoWorker))
