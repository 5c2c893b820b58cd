"""Source → shared object → functions: a small builder with a cache on disk that survives crashes and corruption."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from moec.codegen.cpp import header_texts
from moec.errors import BuildError
from moec.target import Target

# -O2 and not -O3: the kernels are unrolled by hand and build in two thirds of the time.
_FLAGS = ("-O2", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast")
_FLAGS_FAST = (*_FLAGS, "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")


@lru_cache(maxsize=8)
def compiler_version(compiler: str) -> str:
    """The first line that the compiler says about itself; raises BuildError where it cannot be run."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"compiler {compiler!r} cannot be run: {error}; set CXX to a working g++ or clang++"
        ) from error
    return done.stdout.splitlines()[0] if done.stdout else compiler


def build(source: str, target: Target, cache_dir: Path) -> ctypes.CDLL:
    """`source` as a loaded library, built unless the cache has it; raises BuildError.

    The cache key covers the source, the headers, the flags and the compiler, so entries are never stale.
    """
    if target.compiler is None:
        raise BuildError(
            "no C++ compiler found (looked for CXX, g++, clang++, c++); install one or use kernels='eager'"
        )
    flags = (*_FLAGS_FAST, *target.flags)
    path = cache_dir / f"{_key(source, flags, target.compiler)}.so"
    try:
        loaded = _load(path) or _built(source, flags, target.compiler, path)
    except OSError as error:
        raise BuildError(f"the cache folder {cache_dir} cannot be written: {error}; set MOEC_CACHE_DIR") from error
    if loaded is None:
        raise BuildError(f"{path} was built but cannot be loaded; remove it and check {target.compiler!r}")
    return loaded


def _built(source: str, flags: Sequence[str], compiler: str, path: Path) -> ctypes.CDLL | None:
    """The library, built by one process at a time; raises OSError where the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        loaded = _load(path)  # another process may have built it meanwhile
        if loaded is not None:
            return loaded
        _compile(source, flags, compiler, path)
    return _load(path)


def _key(source: str, flags: Sequence[str], compiler: str) -> str:
    parts = (source, *(text for _, text in header_texts()), *flags, compiler, compiler_version(compiler))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _load(path: Path) -> ctypes.CDLL | None:
    """The library, or None where it is missing or damaged (then it is removed, to be built again)."""
    if not path.exists():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        return None


def _compile(source: str, flags: Sequence[str], compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        text = Path(folder, "kernel.cpp")
        text.write_text(source)
        for name, header in header_texts():
            Path(folder, name).write_text(header)
        built = Path(folder, "kernel.so")
        command = [compiler, *flags, str(text), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(f"compiler {compiler!r} cannot be run: {error}") from error
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise BuildError(f"{' '.join(command)} failed:\n" + "\n".join(errors[:5]))
        os.replace(built, path)
