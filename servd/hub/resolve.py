"""What a user names, to files on disk: catalogue name, folder, .gguf file or hub id, tried in this order.

Refuses pickle checkpoints. Knows nothing of the weights' contents.
"""

from __future__ import annotations

import re
from pathlib import Path

from servd.errors import ConfigError
from servd.hub.catalogue import CATALOGUE
from servd.hub.files import ModelFiles, Progress, read_json_object
from servd.hub.gguf_sidecar import gguf_model_files
from servd.hub.pull import pull

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
SHARD_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def resolve_model(model: str, *, progress: Progress | None = None) -> ModelFiles:
    """The files of the model that `model` names, fetched first if need be.

    Raises ConfigError in one line: what was tried, and the known names.
    """
    if model in CATALOGUE:
        return pull(model, progress)
    if "\0" in model or not model:
        raise ConfigError(f"model is {model!r}; allowed: {_allowed()}")
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return folder_model_files(path.resolve())
        exists = path.is_file()
    except OSError as error:
        raise ConfigError(f"model {model!r} cannot be read: {error.strerror}") from None
    if exists:
        if path.suffix != ".gguf":
            _refuse_pickle([path])
            raise ConfigError(f"{path} is not a .gguf file; give the folder that holds config.json and safetensors")
        return gguf_model_files(path)
    if HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _from_hub(model)
    raise ConfigError(f"model {model!r} is not in the catalogue and not a folder or file; allowed: {_allowed()}")


def _allowed() -> str:
    names = ", ".join(sorted(CATALOGUE))
    return f"a catalogue name ({names}), a folder with config.json and safetensors, a .gguf file, a hub id (org/name)"


def folder_model_files(folder: Path, name: str | None = None) -> ModelFiles:
    """The model in `folder`: config.json and safetensors, or one .gguf. Raises ConfigError saying what is missing."""
    names = sorted(path for path in folder.iterdir() if path.is_file())
    safetensors = [path for path in names if path.suffix == ".safetensors"]
    ggufs = [path for path in names if path.suffix == ".gguf"]
    if not safetensors and not (folder / SHARD_INDEX).is_file():
        if len(ggufs) == 1:
            return gguf_model_files(ggufs[0], name or folder.name)
        if ggufs:
            raise ConfigError(f"{folder} holds {len(ggufs)} .gguf files; name one of them")
        _refuse_pickle(names)
        raise ConfigError(f"{folder} holds neither *.safetensors nor a .gguf file")
    for required in ("config.json", "tokenizer.json"):
        if not (folder / required).is_file():
            raise ConfigError(f"{folder} has no {required}; servd needs it beside the weights")
    return ModelFiles(name or folder.name, folder, _shards(folder, safetensors))


def _refuse_pickle(paths: list[Path]) -> None:
    pickles = [path for path in paths if path.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise ConfigError(
            f"{pickles[0]} is a pickle checkpoint, which is refused because loading it runs the code inside; "
            "convert it to safetensors"
        )


def _shards(folder: Path, safetensors: list[Path]) -> tuple[Path, ...]:
    index = folder / SHARD_INDEX
    if not index.is_file():
        if len(safetensors) == 1:
            return (safetensors[0],)
        if (single := folder / "model.safetensors") in safetensors:
            return (single,)
        raise ConfigError(f"{folder} holds {len(safetensors)} .safetensors files and no {SHARD_INDEX} that orders them")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map")
    shards = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(f"{index} names the shard {name!r}; allowed: a .safetensors file of the same folder")
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} lacks the shard {name} that {SHARD_INDEX} names")
        shards.append(folder / name)
    return tuple(shards)


def _from_hub(model: str) -> ModelFiles:
    """A model of the Hugging Face hub: what is cached and whole is used without asking the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = snapshot_download(model, allow_patterns=HUB_PATTERNS, local_files_only=True)
        return folder_model_files(Path(cached), model)
    except (LocalEntryNotFoundError, ConfigError):
        pass  # not cached, or only a part: ask the hub
    except HFValidationError as error:
        raise ConfigError(f"model {model!r} is not a hub id: {error}") from None
    try:
        folder = snapshot_download(model, allow_patterns=HUB_PATTERNS)
    except OSError as error:  # huggingface_hub's HTTP, cache and connection errors all are OSErrors
        reason = str(error).strip().split("\n", 1)[0]
        raise ConfigError(
            f"model {model!r} is no catalogue name, folder or file here, and the hub did not give it ({reason}); "
            f"catalogue: {', '.join(sorted(CATALOGUE))}"
        ) from None
    return folder_model_files(Path(folder), model)
