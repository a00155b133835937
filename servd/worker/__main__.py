"""`python -m servd.worker FD FD FD`: one model worker, started by servd.executor.multiproc.

Knows nothing but where to begin.
"""

from __future__ import annotations

import sys

from servd.worker.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
