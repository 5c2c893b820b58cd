"""`moec doctor`: is this machine able to do what moec does? Every answer says how to change it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from moec.codegen.build import compiler_version
from moec.errors import MoecError
from moec.options import Environment
from moec.own_error import brief
from moec.runtime.nodes import nodes
from moec.target import Target
from moec.view.fitting import FittingTable

STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}
MARKS = {"ok": "✓", "note": "–", "broken": "✗"}
PROBE_SECONDS = 240  # a cold Inductor and a cold C++ build together take 20-60 s on two slow cores
PROBE = "from moec.doctor.probe import main; main()"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer; status: ok | note (works, could be better) | broken."""

    name: str
    status: str
    found: str
    way_out: str


def checks() -> list[Check]:
    """All checks, in order. A check that itself fails is a broken one, never an exception."""
    results: list[Check] = []
    for check in CHECKS:
        try:
            results.append(check())
        except MoecError as error:
            results.append(Check(check.__name__.strip("_"), "broken", str(error), "follow the message"))
        except (OSError, ValueError, LookupError) as error:  # no temporary folder, a library's words on stdout, …
            results.append(Check(check.__name__.strip("_"), "broken", brief(error), "follow the message"))
    return results


def _python() -> Check:
    good = sys.version_info >= (3, 10)
    found = f"{platform.python_version()} ({sys.executable})"
    return Check("python", "ok" if good else "broken", found, "Python 3.10 or later")


def _torch() -> Check:
    good = torch.__version__.partition("+")[0].split(".")[:2] == ["2", "13"]
    return Check("torch", "ok" if good else "broken", str(torch.__version__), "pip install 'torch>=2.13,<2.14'")


def _triton() -> Check:
    found = _installed("triton")
    way_out = "pip install 'triton>=3.7.1,<3.8'; not needed for layers on a CPU"
    return Check("triton", "ok" if found else "note", found or "not installed", way_out)


def _compiler() -> Check:
    command = Target.host().compiler
    way_out = "install g++ or clang++ (Debian: apt-get install g++), or set CXX to one"
    if not command:
        wanted = Environment.read().cxx
        return Check(
            "compiler", "broken", f"CXX={wanted!r} names no program on the path" if wanted else "none found", way_out
        )
    return Check("compiler", "ok", f"{compiler_version(command)} ({shlex.join(command)})", way_out)


def _isa() -> Check:
    target = Target.host()
    pairs = ", bf16 in tiles" if target.tiles else ", bf16 in pairs" if target.bf16_pairs else ""
    found = f"{target.isa}, {32 * target.lanes}-bit vectors{pairs}"
    return Check("instruction set", "ok", found, "MOEC_CPU_ISA=avx2 (or plain) takes a smaller one")


def _threads() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    found = f"torch uses {threads}, the process may use {usable} logical cores"
    way_out = "OMP_NUM_THREADS or torch.set_num_threads(n)"
    if nodes().count > 1:
        found += f" of {nodes().count} memory nodes; each takes weights of its own node first"
        way_out += "; OMP_PROC_BIND=spread keeps threads on their node"
    return Check("threads", "ok" if threads <= usable else "note", found, way_out)


def _cache() -> Check:
    folder = Environment.read().cache_dir
    way_out = "set MOEC_CACHE_DIR to a folder that can be written"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        cost = "kernels are built anew in every process, which takes seconds; proofs and tuning results are not kept"
        return Check("cache", "note", f"{folder} cannot be written ({error.strerror or error}): {cost}", way_out)
    return Check("cache", "ok", f"{folder}, {_size(folder)}", f"{way_out}; it may be deleted at any time")


def _size(folder: Path) -> str:
    built = [path.stat().st_size for path in folder.glob("*.so")]
    return f"{len(built)} libraries, {sum(built) / 1e6:.1f} MB"


def _backend() -> Check:
    way_out = "pip install moec (or pip install -e . in a checkout) into this Python"
    if "moec" not in torch._dynamo.list_backends():
        return Check("backend", "broken", "torch.compile does not know backend='moec'", way_out)
    return Check("backend", "ok", f"torch.compile(model, backend='moec'), moec {_installed('moec')}", way_out)


def _kernel() -> Check:
    way_out = "MOEC_CPU_ISA=plain rules the instruction set out; options={'kernels': 'eager'} does without kernels"
    # In a process of its own: an illegal instruction or a crash is then an answer. An empty cache: it is really built.
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "MOEC_CACHE_DIR": folder}
        try:
            done = subprocess.run(
                [sys.executable, "-c", PROBE],
                env=env,
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Check("kernel", "broken", f"no answer within {PROBE_SECONDS} s", way_out)
    if done.returncode != 0:
        return Check("kernel", "broken", f"exit code {done.returncode}: {_error_line(done.stderr)}", way_out)
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return Check("kernel", "ok" if answer["ok"] else "broken", answer["found"], way_out)


def _error_line(stderr: str) -> str:
    """The line of a traceback that names the error; compilers and torch print advice after it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Failed|Exception|Warning)\b", line)]
    return (named or lines or ["no message"])[-1]


def _transformers() -> Check:
    found = _installed("transformers")
    return Check(
        "transformers",
        "ok" if found else "note",
        found or "not installed",
        "pip install 'moec[test]'; only tests and benchmarks use it",
    )


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


CHECKS: tuple[Callable[[], Check], ...] = (
    _python,
    _torch,
    _triton,
    _compiler,
    _isa,
    _threads,
    _cache,
    _backend,
    _kernel,
    _transformers,
)


def doctor_table(results: list[Check]) -> Table:
    """The answers as a table."""
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("", "what", "found", "to change it"):
        table.add_column(name, overflow="fold")
    for check in results:
        style = STYLES[check.status]
        table.add_row(Text(MARKS[check.status], style), check.name, Text(check.found), Text(check.way_out, "dim"))
    return table
