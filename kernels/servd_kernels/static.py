"""Owns what can be known of Triton kernels without a GPU: they compile, and what the machine code is made of.
Does not know any op: the cases come from `compile_cases()` of each op's triton.py."""

import contextlib
import importlib
import io
import multiprocessing
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from servd_kernels.registry import op_names
from servd_kernels.triton_support import ARCHITECTURES, INTERPRETED, CompileCase

_PACKAGE = Path(__file__).parent

# Backend, its name there, threads of a warp, and the shared memory (LDS) that one program may take, in bytes.
_TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 166_912),
    "sm_90": ("cuda", 90, 32, 232_448),
    "sm_100": ("cuda", 100, 32, 232_448),
    "gfx942": ("hip", "gfx942", 64, 65_536),
}

# What to count in the assembly text, by the name shown.
_TENSOR_CORE = {
    "mma": r"\bmma\.sync\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05": r"\btcgen05\.mma\.",
    "mfma": r"\bv_mfma_",
}
_ASYNC_COPY = {
    "cp.async": r"\bcp\.async\.c[ag]\.",
    "bulk": r"\bcp\.async\.bulk\.(?!commit|wait)",
    "lds": r"\bglobal_load_lds_|\bbuffer_load_\w+ .*\blds\b",
}


@dataclass(frozen=True, slots=True)
class Report:
    """One kernel specialization, compiled for one architecture. `problems`: why it must not ship; empty if it may."""

    op: str
    case: str
    architecture: str
    registers: int = 0  # of a thread
    spilled_bytes: int = 0  # of a thread
    shared_bytes: int = 0  # of a program
    code_bytes: int = 0
    tensor_core: dict[str, int] = field(default_factory=dict)  # instructions in the text, by kind
    async_copy: dict[str, int] = field(default_factory=dict)  # likewise
    seconds: float = 0.0  # to compile; near 0 if Triton had it in its cache
    problems: tuple[str, ...] = ()


def triton_ops() -> list[str]:
    """The ops that have a Triton kernel."""
    return [op for op in op_names() if (_PACKAGE / op / "triton.py").exists()]


def compile_reports(
    ops: Iterable[str],
    architectures: Iterable[str] = ARCHITECTURES,
    workers: int = 2,
    limit: int | None = None,
    only: str = "",
) -> Iterator[Report]:
    """Compiles the cases of the ops whose name contains `only`, at most `limit` of each (spread over its list).

    Raises ValueError for an unknown op or architecture, and where TRITON_INTERPRET is set: its kernels do not compile.
    """
    jobs = list(_jobs(list(ops), list(architectures), limit, only))
    if min(workers, len(jobs)) < 2:
        yield from map(_compile_job, jobs)
        return
    # Not fork: torch has started threads by now.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        yield from executor.map(_compile_job, jobs)


_Job = tuple[str, int, str]  # op, index among its cases, architecture: what travels to a worker process


def _jobs(ops: list[str], architectures: list[str], limit: int | None, only: str) -> Iterator[_Job]:
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    for kind, given, known in (("op", ops, triton_ops()), ("architecture", architectures, list(ARCHITECTURES))):
        for name in given:
            if name not in known:
                raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    for op in ops:
        for architecture in architectures:
            # Tiles differ between architectures: the spread is over those of this one.
            indices = [
                i for i, case in enumerate(_cases(op)) if architecture in case.architectures and only in case.name
            ]
            count = min(limit or len(indices), len(indices))
            for pick in range(count):
                yield op, indices[pick * (len(indices) - 1) // max(1, count - 1)], architecture


def _cases(op: str) -> list[CompileCase]:
    return list(importlib.import_module(f"servd_kernels.{op}.triton").compile_cases())


def _compile_job(job: _Job) -> Report:
    op, index, architecture = job
    return compile_case(op, _cases(op)[index], architecture)


def compile_case(op: str, case: CompileCase, architecture: str) -> Report:
    """Compiles one case, as `op` in the report. Whatever Triton raises becomes the report's problem."""
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where ptxas fails, Triton prints the whole program
            compiled = _compile(case, architecture)
    except Exception as error:  # each stage has errors of its own, and the table goes on with the other cases
        lines = str(error).strip().splitlines() or [""]
        reason = next((line for line in lines if " fatal " in line), lines[-1])
        return Report(op, case.name, architecture, problems=(f"{type(error).__name__}: {reason}",))
    return _inspect(op, case, architecture, compiled, time.perf_counter() - start)


def _compile(case: CompileCase, architecture: str) -> Any:
    backend, name, warp_size, _ = _TARGETS[architecture]
    arguments: list[str] = case.kernel.arg_names
    strays = set(arguments) ^ (set(case.signature) | set(case.constants))
    assert not strays, f"{case.name}: signature and constants do not match the kernel's arguments: {sorted(strays)}"
    signature = {argument: case.signature.get(argument, "constexpr") for argument in arguments}
    aligned = [a for a in arguments if signature[a].startswith("*")] if case.aligned is None else case.aligned
    hints: dict[tuple[int], list[list[object]]] = {}
    for place, argument in enumerate(arguments):
        found: list[list[object]] = [["tt.divisibility", 16]] if argument in aligned else []
        # The launcher tells AMD's compiler of tensors below 2 GiB: it then uses buffer instructions.
        if backend == "hip" and signature[argument].startswith("*") and argument not in case.large:
            found.append(["tt.pointer_range", 32])
        if found:
            hints[(place,)] = found
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=hints)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.extra_options}
    return triton.compile(source, target=GPUTarget(backend, name, warp_size), options=options)


def _inspect(op: str, case: CompileCase, architecture: str, compiled: Any, seconds: float) -> Report:
    is_cuda = _TARGETS[architecture][0] == "cuda"
    text = compiled.asm["ptx" if is_cuda else "amdgcn"]
    registers, spilled = _cuda_registers(compiled.asm["cubin"]) if is_cuda else _amd_registers(text)
    tensor_core, async_copy = _count(_TENSOR_CORE, text), _count(_ASYNC_COPY, text)
    shared, shared_limit = int(compiled.metadata.shared), _TARGETS[architecture][3]
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes a thread")
    if shared > shared_limit:
        problems.append(f"takes {shared} bytes of shared memory; allowed: {shared_limit}")
    if case.uses_dot and not tensor_core:
        problems.append("its dot runs outside the tensor cores")
    return Report(
        op,
        case.name,
        architecture,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        code_bytes=_code_bytes(compiled.asm["cubin" if is_cuda else "hsaco"]),
        tensor_core=tensor_core,
        async_copy=async_copy,
        seconds=seconds,
        problems=tuple(problems),
    )


def _count(patterns: dict[str, str], text: str) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}
    return {name: count for name, count in counts.items() if count}


def _cuda_registers(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes spilled) of a thread. Triton has no local arrays: a stack frame holds nothing but spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", output)
    assert found, f"cuobjdump says nothing of registers: {output!r}"
    return int(found[1]), int(found[2]) + int(found[3])


def _amd_registers(text: str) -> tuple[int, int]:
    """(vector registers, bytes spilled to memory) of a thread.

    Not the spill counts beside them: scalar registers spill to lanes of vector registers, and those to accumulators.
    """

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found, f"the assembly has no .{key}"
        return int(found[1])

    return value("vgpr_count"), value("private_segment_fixed_size")


def _code_bytes(elf: bytes) -> int:
    """Size of the executable sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count = struct.unpack_from("<HH", elf, 0x3A)
    total = 0
    for start in range(table, table + count * entry_size, entry_size):
        _, kind, flags, _, _, size = struct.unpack_from("<IIQQQQ", elf, start)
        if kind == 1 and flags & 4:  # SHT_PROGBITS, SHF_EXECINSTR
            total += size
    return total


_COLUMNS = "op|case|arch|registers|spilled B|shared B|code B|tensor core|async copy|problems".split("|")


def table_head() -> str:
    """The head of a Markdown table of reports."""
    return f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"


def table_row(report: Report) -> str:
    """One report as a row of the Markdown table."""
    counts = [
        ", ".join(f"{name} x{count}" for name, count in kind.items()) or "-"
        for kind in (report.tensor_core, report.async_copy)
    ]
    numbers = [report.registers, report.spilled_bytes, report.shared_bytes, report.code_bytes]
    cells = [report.op, report.case, report.architecture, *map(str, numbers), *counts, "; ".join(report.problems)]
    return f"| {' | '.join(cells)} |\n"
