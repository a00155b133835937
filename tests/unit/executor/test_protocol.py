"""What crosses the wire comes out as it went in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from servd.config import EngineConfig
from servd.executor import protocol
from servd.hub import ModelFiles

PLAIN = ModelFiles("m", Path("/models/m"), (Path("/models/m/a.safetensors"), Path("/models/m/b.safetensors")))
FULL = ModelFiles("m", Path("/m"), (Path("/m/m.gguf"),), Path("/m/tensors.json"), {"temperature": 0.2}, "w8a8")


@pytest.mark.parametrize("files", [PLAIN, FULL])
def test_the_worker_gets_the_files_whole(files: ModelFiles) -> None:
    sent = protocol.Start(EngineConfig(), protocol.WireModelFiles.of(files), "info")
    received = protocol.decode_to_worker(protocol.encode(sent))
    assert isinstance(received, protocol.Start)
    assert received.files.to_model_files() == files
    assert received.config == EngineConfig()


def test_no_field_is_left_at_its_default() -> None:
    """A field added to ModelFiles must be added to the wire, and to FULL."""
    for field in dataclasses.fields(ModelFiles):
        assert getattr(FULL, field.name), field.name
