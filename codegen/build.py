"""Source → shared object → functions: a small builder with a cache on disk that survives crashes and corruption."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from moec.codegen.cpp import header_texts
from moec.errors import BuildError
from moec.options import Environment
from moec.target import Target

# -O2 and not -O3: the kernels are unrolled by hand and build in two thirds of the time.
_FLAGS = ("-O2", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast")
_FLAGS_FAST = (*_FLAGS, "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_SEAL = b"moec sealed "  # and a hash: what stands behind every library in the cache


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

    The cache key covers the source, the headers, the flags and the compiler, so entries are never stale. Where nothing
    can be written to the cache, it is built for this process alone, with one warning.
    """
    if target.compiler is None:
        raise BuildError(_no_compiler(Environment.read().cxx))
    flags = (*_FLAGS_FAST, *target.flags)
    name = f"{_key(source, flags, target.compiler)}.so"
    try:
        return _kept(source, flags, target.compiler, cache_dir / name)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        _warn_not_kept(cache_dir, str(error))
    try:
        with tempfile.TemporaryDirectory() as folder:  # what is loaded does not need its file any more
            return _kept(source, flags, target.compiler, Path(folder, name))
    except (OSError, NotImplementedError) as error:
        raise BuildError(
            f"no kernel can be built: neither {cache_dir} nor the system's temporary folder can be written ({error}); "
            "set MOEC_CACHE_DIR or TMPDIR to a folder that can"
        ) from error


def _no_compiler(wanted: str | None) -> str:
    if wanted:
        return f"CXX={wanted!r} is no program on the path; expected one name or path; correct or unset it"
    return "no C++ compiler found (looked for g++, clang++, c++); install one, set CXX, or use kernels='eager'"


def _kept(source: str, flags: Sequence[str], compiler: str, path: Path) -> ctypes.CDLL:
    """The library at `path`, built where it is not there; raises OSError where nothing can be written."""
    loaded = _load(path)
    if loaded is not None:
        return loaded
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        loaded = _load(path)  # another process may have built it meanwhile
        if loaded is not None:
            return loaded
        _compile(source, flags, compiler, path)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(
                f"{path} was built but cannot be loaded ({error}); check {compiler!r}, and that programs may run from "
                "that folder, or set MOEC_CACHE_DIR to another"
            ) from error


@lru_cache(maxsize=16)
def _warn_not_kept(cache_dir: Path, why: str) -> None:
    """Say once that kernels are built anew in every process."""
    warnings.warn(
        f"moec: kernels are not kept: the cache folder {cache_dir} cannot be written ({why}); they are built anew in "
        "every process, which takes seconds; set MOEC_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


def _key(source: str, flags: Sequence[str], compiler: str) -> str:
    parts = (source, *(text for _, text in header_texts()), *flags, compiler, compiler_version(compiler))
    return sha256("\0".join(parts).encode()).hexdigest()[:32]


def _load(path: Path) -> ctypes.CDLL | None:
    """The library, or None where it is missing or damaged (then it is removed, to be built again)."""
    if not path.exists():
        return None
    try:
        if _is_whole(path.read_bytes()):
            return ctypes.CDLL(str(path))
    except OSError:
        pass
    path.unlink(missing_ok=True)
    return None


def _seal(library: bytes) -> bytes:
    """What is put behind a library, where loaders do not look: its hash."""
    return _SEAL + sha256(library).digest()


def _is_whole(content: bytes) -> bool:
    """Whether these are all the bytes that were written: to load a library that lacks some may end the process."""
    library = content.rpartition(_SEAL)[0]
    return content == library + _seal(library)


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
        if not built.exists():
            raise BuildError(f"{' '.join(command)} wrote no library; set CXX to a working g++ or clang++")
        library = built.read_bytes()
        with built.open("ab") as file:
            file.write(_seal(library))
        os.replace(built, path)
