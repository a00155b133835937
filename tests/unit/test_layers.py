"""The layers of the code: which package may import which. Function-level imports count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Values and errors that every layer may use.
COMMON = {"errors", "registry", "config", "grammar", "log", "outputs", "request", "sampling_params"}
ALLOWED = {
    **dict.fromkeys(COMMON, COMMON),
    "": {"engine"} | COMMON,  # servd/__init__.py: the public names
    "metrics": set(),
    "hub": {"errors"},
    "cache": COMMON,
    "scheduler": {"cache"} | COMMON,
    "engine": {"scheduler", "cache", "executor", "hub", "metrics"} | COMMON,
    "api": {"engine", "executor", "hub", "metrics", ""} | COMMON,
    "cli": {"api", "benchmark", "engine", "eval", "executor", "hub", ""} | COMMON,
    "benchmark": {"eval", ""} | COMMON,  # of eval the text alone
    "eval": {"models", "attention", "worker", "hub"} | COMMON,
    "executor": {"worker", "hub"} | COMMON,
    "worker": {"models", "attention", "distributed", "executor", "hub"} | COMMON,
    "models": {"layers", "attention", "quant", "distributed", "hub"} | COMMON,
    "layers": {"quant", "distributed", "attention"} | COMMON,
    "attention": COMMON,
    "quant": {"distributed"} | COMMON,
    "distributed": set(),
}
# Who may use the kernels, and torch at all.
KERNEL_USERS = {"worker", "eval", "models", "layers", "attention", "quant"}
TORCH_USERS = KERNEL_USERS | {"distributed"}


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module)
            if node.module == "servd":
                found |= {f"servd.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> str:
    parts = module.split(".")
    known = len(parts) > 1 and ((ROOT / "servd" / parts[1]).is_dir() or (ROOT / "servd" / f"{parts[1]}.py").is_file())
    return parts[1] if known else ""


SOURCES = sorted(path for path in (ROOT / "servd").rglob("*.py") if "_pb" not in path.parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    relative = path.relative_to(ROOT / "servd").parts
    layer = "" if relative == ("__init__.py",) else relative[0].removesuffix(".py")
    for module in imports_of(path):
        root = module.split(".")[0]
        if root == "servd":
            target = layer_of(module)
            assert target == layer or target in ALLOWED[layer], f"{layer or 'servd'} must not import {module}"
        elif root == "servd_kernels":
            assert layer in KERNEL_USERS, f"{layer} must not import {module}"
        elif root in ("torch", "triton"):
            assert layer in TORCH_USERS, f"{layer} must not import {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_know_nothing_of_servd(path):
    assert not [module for module in imports_of(path) if module.split(".")[0] == "servd"]


FRONT = ["servd", "servd.engine.async_engine", "servd.engine.llm", "servd.executor.multiproc", "servd.api.lifecycle",
         "servd.benchmark.session", "servd.benchmark.plan"]  # fmt: skip


@pytest.mark.parametrize("module", FRONT)
def test_the_front_process_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
