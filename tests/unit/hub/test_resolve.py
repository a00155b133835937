"""From a name to files: folders, .gguf files, the catalogue, the hub's cache; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from servd.errors import ConfigError
from servd.hub import CatalogueEntry, resolve_model

GGUFMaker = Callable[..., Path]


def hf_folder(folder: Path, *weights: str, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"vocab_size": 8}')
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    for name in weights:
        (folder / name).write_bytes(b"")
    return folder


def test_folder_with_one_safetensors(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model-a", "model.safetensors", "pytorch_model.bin")
    files = resolve_model(str(folder))
    assert (files.name, files.folder, files.tensor_index) == ("model-a", folder, None)
    assert files.weights == (folder / "model.safetensors",)
    assert files.config() == {"vocab_size": 8}


def test_sharded_folder_keeps_the_order_of_the_shards(tmp_path: Path) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    folder = hf_folder(tmp_path / "m", *shards, "consolidated.safetensors")
    weight_map = {"b": shards[1], "a": shards[0], "c": shards[1]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert resolve_model(str(folder)).weights == tuple(folder / name for name in shards)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "weights.bin", "missing.safetensors"])
def test_shard_index_may_name_only_files_of_the_folder(tmp_path: Path, shard: str) -> None:
    folder = hf_folder(tmp_path / "m", "weights.bin")
    (tmp_path / "outside.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ConfigError, match="shard"):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickle_checkpoints_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    folder = hf_folder(tmp_path / "m", name)
    for model in (folder, folder / name):
        with pytest.raises(ConfigError, match="loading it runs the code inside; convert it to safetensors"):
            resolve_model(str(model))


def test_pickles_are_refused_also_where_asserts_are_off(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "pytorch_model.bin")
    code = "import sys; from servd.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
    command = [sys.executable, "-O", "-c", code, str(folder), "--port", "0", "--grpc-port", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "is a pickle checkpoint, which is refused" in done.stderr


@pytest.mark.parametrize(
    ("weights", "tokenizer", "reason"),
    [
        (["model.safetensors"], False, "has no tokenizer.json"),
        ([], True, "neither .*safetensors nor a .gguf"),
        (["a.safetensors", "b.safetensors"], True, "no model.safetensors.index.json"),
        (["a.gguf", "b.gguf"], True, "2 .gguf files; name one"),
    ],
)
def test_incomplete_folder_says_what_is_missing(
    tmp_path: Path, weights: list[str], tokenizer: bool, reason: str
) -> None:
    folder = hf_folder(tmp_path / "m", *weights, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=reason):
        resolve_model(str(folder))


def test_folder_without_config(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_model(str(folder))


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": ' * 100_000])
def test_malformed_config_is_named(tmp_path: Path, text: str) -> None:
    folder = hf_folder(tmp_path / "m", "model.safetensors")
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve_model(str(folder)).config()


def test_gguf_file_and_folder_with_one(make_gguf: GGUFMaker, home: Path) -> None:
    path = make_gguf(name="tiny-q4.gguf")
    by_file = resolve_model(str(path))
    assert (by_file.name, by_file.weights) == ("tiny-q4", (path,))
    by_folder = resolve_model(str(path.parent))
    assert (by_folder.name, by_folder.folder) == (path.parent.name, by_file.folder)
    assert by_file.tensor_index is not None
    assert json.loads(by_file.tensor_index.read_text())[0]["name"] == "token_embd.weight"


def test_catalogue_name_is_pulled(tiny_entry: CatalogueEntry) -> None:
    assert resolve_model("tiny").name == "tiny"


@pytest.mark.parametrize("model", ["", "nothing", "../../etc/nothing", "/absent/x.gguf", "a\0b", "a:b:c", "x" * 5000])
def test_unknown_model_names_what_is_allowed(model: str) -> None:
    with pytest.raises(ConfigError):
        resolve_model(model)


def test_unknown_model_message() -> None:
    with pytest.raises(ConfigError, match=r"'smol' is not in the catalogue.*smollm2-135m-instruct.*hub id"):
        resolve_model("smol")


def test_other_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        resolve_model(str(path))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_hub_id_in_the_cache_needs_no_network(hub_cache: Path) -> None:
    repository = hub_cache / "models--org--tiny"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    hf_folder(repository / "snapshots" / commit, "model.safetensors")
    files = resolve_model("org/tiny")
    assert (files.name, files.folder) == ("org/tiny", repository / "snapshots" / commit)


def test_hub_id_that_cannot_be_fetched_names_what_was_tried(hub_cache: Path) -> None:
    with pytest.raises(ConfigError, match="no catalogue name.* and the hub did not give it") as raised:
        resolve_model("org/absent")
    assert "\n" not in raised.value.message
