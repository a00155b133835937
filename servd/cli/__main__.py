"""`python -m servd.cli`: the same as the `servd` script, for where the script is not on the path."""

from __future__ import annotations

import sys

from servd.cli import main

if __name__ == "__main__":
    sys.exit(main())
