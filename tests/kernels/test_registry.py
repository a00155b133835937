"""Owns the tests of the backend choice, of the native loader and of the thread pool.
Does not know any op's arithmetic."""

import importlib
import inspect
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from servd_kernels import Op, build, native, op_names, registry
from servd_kernels.kv_format import KVFormat
from servd_kernels.linear import linear, pack

OPS = [
    "copy_blocks",
    "embedding",
    "gelu",
    "gelu_and_mul",
    "layer_norm",
    "linear",
    "linear_fp8",
    "linear_w8a8",
    "linear_wna16",
    "lora",
    "moe",
    "page_bounds",
    "paged_attention",
    "rms_norm",
    "rope_and_cache",
    "route",
    "sample",
    "select_pages",
    "silu_and_mul",
    "swap_blocks",
]
KERNELS = Path(build.__file__).parent.parent


def heads_of(head_dim: int) -> KVFormat:
    return KVFormat("float32", "float32", 1, head_dim, 16)


def test_ops_are_the_folders() -> None:
    assert op_names() == OPS


@pytest.mark.parametrize("name", OPS)
def test_every_backend_keeps_the_contract(name: str) -> None:
    reference = importlib.import_module(f"servd_kernels.{name}.reference")
    assert callable(reference.make_inputs)
    for backend in Op(name).backends():
        module = importlib.import_module(f"servd_kernels.{name}.{backend}")
        assert inspect.signature(module.run) == inspect.signature(reference.run)
        assert list(inspect.signature(module.supports).parameters)[:2] == ["device", "dtype"]


def test_unknown_op_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"'matmul'; known: .*rms_norm"):
        Op("matmul")


def test_unknown_backend_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"no backend of that name.*known: .*reference"):
        Op("rms_norm").bind(backend="rocm")


def test_explicit_choice_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match=r"head_dim must be at most 256, not 512"):
        Op("paged_attention").bind(backend="cpu", kv_format=heads_of(512))


def test_automatic_choice_falls_back_once_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    registry._logged_reasons.clear()
    with caplog.at_level(logging.WARNING):
        runs = [Op("paged_attention").bind(kv_format=heads_of(512)) for _ in range(2)]
        Op("paged_attention").bind(kv_format=heads_of(264))
    assert [run.__module__.rpartition(".")[2] for run in runs] == ["reference"] * 2
    told = [record.message for record in caplog.records if "head_dim" in record.message]
    assert [message.partition("(")[2] for message in told] == [
        "cpu: head_dim must be at most 256, not 512)",
        "cpu: head_dim must be at most 256, not 264)",
    ]
    assert all(message.startswith("paged_attention runs on its slow reference") for message in told)


def test_without_a_library_one_line_speaks_for_all_ops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry._logged_reasons.clear()
    monkeypatch.setattr(native, "library", lambda: None)
    with caplog.at_level(logging.WARNING):
        for name in ("rms_norm", "linear", "silu_and_mul"):
            Op(name).bind()
    assert len([record for record in caplog.records if "slow reference" in record.message]) == 1


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVD_KERNEL_BACKEND", "reference")
    assert Op("rms_norm").bind().__module__ == "servd_kernels.rms_norm.reference"
    monkeypatch.setenv("SERVD_KERNEL_BACKEND", "none")
    with pytest.raises(ValueError, match="none"):
        Op("rms_norm").bind()


def test_missing_library_is_a_reason_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ValueError, match=r"install a C\+\+17 compiler"):
        Op("rms_norm").bind(backend="cpu")
    assert Op("rms_norm").bind().__module__ == "servd_kernels.rms_norm.reference"


def test_no_compiler_is_logged_and_gives_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "_lib" / "lib.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.compile_library() is None
    assert "no-such-compiler is not found" in caplog.text and "C++17 compiler" in caplog.text


def test_half_a_library_is_built_anew_and_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert native.isas(), "these tests need a compiler"
    for name in ("LIBRARY", "FINGERPRINT"):
        copy = tmp_path / getattr(build, name).name
        copy.write_bytes(getattr(build, name).read_bytes())
        monkeypatch.setattr(build, name, copy)
    assert build.is_fresh()
    build.LIBRARY.write_bytes(build.LIBRARY.read_bytes()[:40_000])
    assert not build.is_fresh()


def test_package_and_build_import_without_torch() -> None:
    code = "import sys, servd_kernels.build; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(KERNELS)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_unknown_isa_names_the_known() -> None:
    with pytest.raises(ValueError, match="portable"):
        native.select_isa("avx1024")


def test_callers_on_several_threads_get_their_own_results(restore_threads: None) -> None:
    native.set_num_threads(3)
    packed = pack(torch.randn(300, 200))
    inputs = [torch.randn(20, 200) for _ in range(4)]
    expected = [linear(x, packed) for x in inputs]
    results: list[bool] = []

    def repeat(index: int) -> None:
        results.extend(torch.equal(linear(inputs[index], packed), expected[index]) for _ in range(200))

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 800


@pytest.mark.filterwarnings("ignore:.*fork")  # Python 3.12 warns of threads; surviving them is the point
def test_a_forked_child_computes() -> None:
    packed = pack(torch.randn(300, 200))
    x = torch.randn(20, 200)
    expected = linear(x, packed)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x, packed), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
