"""The worker process with its steps recorded, in wall time; started in place of servd.worker.

Knows nothing of what is done with the record.
"""

from __future__ import annotations

import os
import sys

from bench.profiling import points
from bench.profiling.process import OPS_VARIABLE, record_process
from bench.profiling.spans import Recorder


def main() -> int:
    """Wrap, then work."""
    from servd.worker.main import main as worker_main

    recorder = Recorder()
    if os.environ.get(OPS_VARIABLE) == "1":
        from bench.profiling.ops import record_ops

        record_ops(recorder)
    record_process("worker", recorder, points.WORKER)
    return worker_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
