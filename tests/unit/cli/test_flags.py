"""Flags are the config's fields: every one is there, with unit and default, and reads back what was written."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from servd.cli import Parser, make_parser
from servd.cli.flags import add_flags, help_text, read_flags
from servd.cli.generate import read_sampling
from servd.cli.serve import read_configs
from servd.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, ServerConfig
from servd.errors import ConfigError
from servd.sampling_params import SamplingParams

SECTIONS: list[type[Any]] = [ModelConfig, CacheConfig, SchedulerConfig, ParallelConfig, ServerConfig]
FIELDS = [(section, field) for section in SECTIONS for field in dataclasses.fields(section)]


def serve(*argv: str) -> argparse.Namespace:
    return make_parser().parse_args(["serve", *argv])


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=[field.name for _, field in FIELDS])
def test_help_shows_each_field_with_help_unit_and_default(
    section: type[Any],
    field: dataclasses.Field[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no wrapping
    with pytest.raises(SystemExit) as exit_info:
        serve("--help")
    assert exit_info.value.code == 0
    name = field.name.upper() if field.metadata.get("positional") else "--" + field.name.replace("_", "-")
    shown = " ".join(capsys.readouterr().out.split("\noptions:\n")[1].split())
    before, after = shown.split(field.metadata["help"])
    assert name in before[-100:]
    notes = after.split("]")[0].removeprefix(" [") if after.startswith(" [") else ""
    assert "default" in field.metadata["help"] + notes
    assert field.metadata.get("unit", "") in notes
    if field.default is not None and not isinstance(field.default, bool):
        assert f"default: {'none' if field.default == '' else field.default}" in notes


@pytest.mark.parametrize("section", SECTIONS)
def test_no_flags_give_the_defaults(section: type[Any]) -> None:
    parser = Parser()
    add_flags(parser, section)
    assert read_flags(parser.parse_args([]), section) == section()


def test_flags_reach_their_fields() -> None:
    config, server = read_configs(
        serve(
            "folder/model",
            "--dtype",
            "float32",
            "--block-size=32",
            "--kv-cache-memory",
            "1.5GiB",
            "--no-enable-prefix-caching",
            "--max-num-seqs",
            "8",
            "--threads",
            "3",
            "--port",
            "0",
            "--log-steps",
            "--shutdown-grace",
            "2.5",
            "--max-body-bytes",
            "1MiB",
            "--gpu-memory-utilization",
            "0.5",
        )  # fmt: skip
    )
    assert config.model == ModelConfig(model="folder/model", dtype="float32")
    assert config.cache == CacheConfig(
        block_size=32, kv_cache_memory=3 << 29, enable_prefix_caching=False, gpu_memory_utilization=0.5
    )
    assert config.scheduler == SchedulerConfig(max_num_seqs=8)
    assert config.parallel == ParallelConfig(threads=3)
    assert server == ServerConfig(port=0, log_steps=True, shutdown_grace=2.5, max_body_bytes=1 << 20)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--port", "http"], "--port: invalid int value: 'http'"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--kv-cache-memory", "much"], "'much' is not a size in bytes"),
        (["--kv-cache-memory", "nan"], "'nan' is not a size in bytes"),
        (["--blocksize", "16"], "unrecognized arguments: --blocksize"),
        (["--block", "16"], "unrecognized arguments: --block"),
        (["--shutdown-grace"], "--shutdown-grace: expected one argument"),
    ],
)
def test_a_wrong_flag_is_named(argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match="--help") as error:
        serve(*argv)
    assert expected in error.value.message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--block-size", "0"], "--block-size is 0; allowed: 1 to 256"),
        (["--max-num-seqs", "0"], "--max-num-seqs is 0"),
        (["--max-num-batched-tokens", "8"], "--max-num-batched-tokens is 8"),
        (["--max-model-len", "1"], "--max-model-len is 1"),
        (["--kv-cache-memory", "0"], "--kv-cache-memory is 0"),
        (["--gpu-memory-utilization", "nan"], "--gpu-memory-utilization is nan"),
        (["--threads", "0"], "--threads is 0"),
        (["--step-timeout", "-1"], "--step-timeout is -1.0; allowed: 0 (never) or more"),
        (["--max-body-bytes", "1"], "--max-body-bytes is 1; allowed: 1024 to"),
        (["--max-body-chunks", "0"], "--max-body-chunks is 0"),
        (["--max-json-depth", "1000"], "--max-json-depth is 1000; allowed: 8 to 512"),
        (["--max-request-line", "10"], "--max-request-line is 10"),
        (["--max-header-bytes", "10"], "--max-header-bytes is 10"),
        (["--max-headers", "1"], "--max-headers is 1; allowed: 10 to"),
        (["--max-prompts", "0"], "--max-prompts is 0; allowed: 1 to 1024"),
        (["--resume-buffer-bytes", "-5"], "--resume-buffer-bytes is -5; allowed: 1024 to"),
        (["--sse-keep-alive", "-1"], "--sse-keep-alive is -1.0; allowed: 0 to 86400"),
        (["--resume-seconds", "-1"], "--resume-seconds is -1.0; allowed: 0 to 86400"),
        (["--shutdown-grace", "nan"], "--shutdown-grace is nan; allowed: 0 to 86400"),
    ],
)
def test_a_value_out_of_range_is_named(argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_configs(serve(*argv))
    assert expected in error.value.message


def test_the_api_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVD_API_KEY", "from-env")
    assert read_configs(serve())[1].api_key == "from-env"
    assert read_configs(serve("--api-key", "from-flag"))[1].api_key == "from-flag"
    monkeypatch.setenv("SERVD_API_KEY", "")
    assert read_configs(serve())[1].api_key is None


def test_a_percent_sign_in_help_is_printed() -> None:
    parser = argparse.ArgumentParser()
    config = dataclasses.make_dataclass(
        "C", [("x", int, dataclasses.field(default=5, metadata={"help": "50 %", "unit": ""}))]
    )
    add_flags(parser, config)
    assert "50 % [default: 5]" in parser.format_help()
    assert help_text(dataclasses.fields(config)[0], 5) == "50 %% [default: 5]"


def generate(*argv: str) -> argparse.Namespace:
    return make_parser().parse_args(["generate", "--prompt", "x", *argv])


def test_generate_shows_the_defaults_that_it_has_and_takes_no_flag_that_it_ignores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        generate("--help")
    shown = capsys.readouterr().out
    assert "default: inproc" in shown
    assert "default: multiproc" not in shown
    assert read_flags(generate(), ParallelConfig).executor == "inproc"
    for ignored in ("--served-model-name", "--max-num-queued-reqs", "--port"):
        assert ignored not in shown
        with pytest.raises(ConfigError, match=ignored):
            generate(ignored, "1")


def test_generate_samples_as_the_model_recommends_unless_told() -> None:
    recommended = {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
    assert read_sampling(generate(), recommended) == SamplingParams(max_tokens=128, **recommended)
    told = read_sampling(generate("--temperature", "0", "--top-k", "5", "--stop", "a"), recommended)
    assert told == SamplingParams(
        max_tokens=128, temperature=0.0, top_p=0.9, top_k=5, repetition_penalty=1.1, stop=("a",)
    )


@pytest.mark.parametrize("key", ["schlüssel", "two words", "tab\there"])
def test_an_api_key_that_no_header_can_carry_is_refused_without_repeating_it(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key") as caught:
        read_configs(serve("--api-key", key))
    assert key not in caught.value.message
