"""A servd over a fake worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.benchmark.servers import ServdServer


@pytest.fixture
def servd(tmp_path: Path) -> Iterator[ServdServer]:
    with ServdServer(tmp_path) as server:
        yield server
