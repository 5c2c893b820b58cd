"""Compile one kernel for a GPU that is not there, in a process of its own, and read its figures.

A kernel that the compiler rejects, crashes on or never finishes is a value (`Refused`), and costs only itself.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from moec.files import write_whole
from moec.gpu.figures import Figures, read_figures
from moec.gpu.target import GpuTarget

_TEXTS = ("ttir", "ttgir", "llir", "ptx", "sass", "usage", "amdgcn")


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
    """Compile `job` for `target` within `timeout` seconds. What was compiled once is read from cache_dir."""
    kept = cache_dir / "offline" / f"{_key(job, target)}.json.gz"
    made = _kept(kept)
    if made is None:
        with tempfile.TemporaryDirectory(prefix="moec-offline-") as name:
            folder = Path(name)
            _write(job, target, folder)
            refused = _run(folder, timeout)
            if refused:
                return refused
            made = _made(folder)
        _keep(made, kept)
    return Compiled(
        read_figures(target, made["texts"], made["shared"], job.num_warps, made["num_warps"]), made["texts"]
    )


def _made(folder: Path) -> dict[str, Any]:
    written = {kind: folder / f"kernel.{kind}" for kind in _TEXTS}
    texts = {kind: path.read_text() for kind, path in written.items() if path.exists()}
    return {"texts": texts, **json.loads((folder / "result.json").read_text())}


def _key(job: Job, target: GpuTarget) -> str:
    """Covers all that the machine code depends on: the job, the target, the compiler, how it is called."""
    worker = Path(__file__).with_name("offline_worker.py").read_text()
    parts = (json.dumps(_described(job, target), sort_keys=True), job.source, version("triton"), worker)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _kept(path: Path) -> dict[str, Any] | None:
    """An earlier result; None where there is none or its file is damaged."""
    try:
        made = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, ValueError, EOFError, RecursionError, zlib.error):
        return None
    return cast("dict[str, Any]", made) if _is_made(made) else None


def _is_made(made: Any) -> bool:
    """Whether it is what `_made` returns: texts by kind, and two numbers."""
    if not isinstance(made, dict):
        return False
    values = cast("dict[str, Any]", made)
    texts, numbers = values.get("texts"), (values.get("shared"), values.get("num_warps"))
    if not isinstance(texts, dict) or any(type(number) is not int for number in numbers):
        return False
    found = cast("dict[str, Any]", texts)
    return not {"sass", "amdgcn"}.isdisjoint(found) and all(isinstance(text, str) for text in found.values())


def _keep(made: dict[str, Any], path: Path) -> None:
    """Keep the result; a cache that cannot be written is done without."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, gzip.compress(json.dumps(made).encode(), 3))


def _write(job: Job, target: GpuTarget, folder: Path) -> None:
    source = folder / "kernels.py"
    source.write_text(job.source)
    (folder / "job.json").write_text(json.dumps({"source": str(source), **_described(job, target)}))


def _described(job: Job, target: GpuTarget) -> dict[str, Any]:
    values = {
        name: {"pointer": value.dtype, "bytes": value.bytes} if isinstance(value, Pointer) else value
        for name, value in job.arguments.items()
    }
    return {
        "kernel": job.kernel, "arguments": values, "num_warps": job.num_warps, "num_stages": job.num_stages,
        "options": dict(job.options), "backend": target.backend, "arch": target.arch, "warp": target.warp,
    }  # fmt: skip


def _run(folder: Path, timeout: float) -> Refused | None:
    """Run the worker; what went wrong, or None."""
    command = [sys.executable, "-m", "moec.gpu.offline_worker", str(folder)]
    # A session of its own, so that the assembler that Triton starts ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=_environment(folder), start_new_session=True,
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


def _environment(folder: Path) -> dict[str, str]:
    own = {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))),
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
