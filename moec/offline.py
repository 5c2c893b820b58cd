"""Compile one kernel for a GPU that is not there, in a process of its own, and read its figures.

A kernel that the compiler rejects, crashes on or never finishes is a value (`Refused`), and costs only itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec.figures import Figures, read_figures
from moec.gpu_target import GpuTarget

_TEXTS = ("ttir", "ttgir", "llir", "ptx", "sass", "usage", "amdgcn")
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "i64": 8, "i32": 4, "i8": 1, "i1": 1, "fp8e4nv": 1, "fp8e5": 1}


@dataclass(frozen=True)
class Pointer:
    """A tensor argument, 16-byte aligned: its element type as Triton names it, and its size in bytes."""

    dtype: str
    bytes: int


@dataclass(frozen=True)
class Job:
    """One kernel to compile: Python source, the kernel's name, its arguments by name, and the compiler's options.

    An argument is a Pointer or the number that a call would pass; values of constexpr arguments are among them.
    """

    source: str
    kernel: str
    arguments: Mapping[str, Pointer | int | float | bool | str | None]
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Compiled:
    """A kernel's figures on a target, and its texts by kind: ttir, ttgir, llir, ptx and sass, or amdgcn."""

    figures: Figures
    texts: Mapping[str, str]

    @property
    def assembly(self) -> str:
        """The target's machine code as text."""
        return self.texts["sass"] if "sass" in self.texts else self.texts["amdgcn"]


@dataclass(frozen=True)
class Refused:
    """Why a kernel has no machine code for a target: one line, and all that the compiler said."""

    reason: str
    log: str


def compile_offline(job: Job, target: GpuTarget, cache_dir: Path, timeout: float = 120.0) -> Compiled | Refused:
    """Compile `job` for `target` within `timeout` seconds. Compiled kernels are kept in cache_dir."""
    with tempfile.TemporaryDirectory(prefix="moec-offline-") as name:
        folder = Path(name)
        _write(job, target, folder)
        refused = _run(folder, cache_dir, timeout)
        if refused:
            return refused
        texts = {
            kind: (folder / f"kernel.{kind}").read_text() for kind in _TEXTS if (folder / f"kernel.{kind}").exists()
        }
        result = json.loads((folder / "result.json").read_text())
    return Compiled(read_figures(target, texts, result["shared"], job.num_warps), texts)


def _write(job: Job, target: GpuTarget, folder: Path) -> None:
    (folder / "kernels.py").write_text(job.source)
    values = {
        name: {"pointer": value.dtype, "bytes": value.bytes} if isinstance(value, Pointer) else value
        for name, value in job.arguments.items()
    }
    described = {
        "source": str(folder / "kernels.py"), "kernel": job.kernel, "arguments": values, "num_warps": job.num_warps,
        "num_stages": job.num_stages, "options": dict(job.options), "backend": target.backend, "arch": target.arch,
        "warp": target.warp,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(described))


def _run(folder: Path, cache_dir: Path, timeout: float) -> Refused | None:
    """Run the worker; what went wrong, or None."""
    command = [sys.executable, "-m", "moec.offline_worker", str(folder)]
    # A session of its own, so that the assembler that Triton starts ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=_environment(cache_dir), start_new_session=True,
    )  # fmt: skip
    try:
        log, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return Refused(f"the compiler did not finish within {timeout:g} s", "")
    finally:
        _end(process)
    if process.returncode < 0:
        return Refused(f"the compiler crashed ({signal.Signals(-process.returncode).name}): {_last_error(log)}", log)
    if process.returncode or not (folder / "result.json").exists():
        return Refused(_last_error(log) or f"the compiler ended with code {process.returncode}", log)
    return None


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and all it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _environment(cache_dir: Path) -> dict[str, str]:
    own = {
        "TRITON_CACHE_DIR": str(cache_dir / "offline"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))),
        "TRITON_INTERPRET": "0",
    }
    return {**os.environ, **own}


_SAYS_WHY = (
    re.compile(r"ptxas\S*\s.*?(?:error|fatal)\s*:\s*(.+)"),
    re.compile(r"^(?:\S+: )?error: (.+)"),
    re.compile(r"^(LLVM ERROR: .+)"),
    re.compile(r"(Assertion .+)"),
    re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception|OutOfResources)\b.*)"),
)


def _last_error(log: str) -> str:
    """The line of the compiler's output that says most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in _SAYS_WHY:
        found = [match[1] for match in map(pattern.search, lines) if match]
        if found:
            # Triton's own errors say where in the kernel first, and what in their last line.
            return (f"{found[-1]} {lines[-1]}" if found[-1].endswith(":") else found[-1])[:300]
    return lines[-1][:300] if lines else ""
