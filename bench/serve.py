#!/usr/bin/env python3
"""`servd bench` for who looks in this folder: load on any OpenAI-compatible server. All of it is in servd/benchmark."""

import sys

from servd.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
