"""Source → shared object → functions: a small builder with a cache on disk that survives crashes and corruption."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from filelock import FileLock

from moec.codegen.cpp import header_texts
from moec.errors import BuildError
from moec.options import Environment
from moec.target import Target

# -O2 and not -O3: the kernels are unrolled by hand and build in two thirds of the time.
_FLAGS = ("-O2", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast")
_FLAGS_FAST = (*_FLAGS, "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_FLAGS_TORCH = ("-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-w")  # what torch's headers want
_ANOTHER = "set CXX to a working g++ or clang++"
_ROOM = 4 << 20  # bytes, more than any kernel: whether they can be written tells a full disk from a wrong source
_SEAL = b"moec sealed "  # and a hash: what stands behind every library in the cache


@dataclass(frozen=True)
class Unit:
    """What is compiled to one library: C++, the headers beside it by name, the compiler's flags, libraries to link."""

    source: str
    headers: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()

    def key(self, compiler: tuple[str, ...]) -> str:
        """A name that no other unit has, nor this one by another compiler."""
        texts = (self.source, *(text for _, text in self.headers), *self.flags, *self.libraries)
        return sha256("\0".join((*texts, *compiler, compiler_version(compiler))).encode()).hexdigest()[:32]


@lru_cache(maxsize=8)
def compiler_version(compiler: tuple[str, ...]) -> str:
    """The first line that the compiler says about itself; raises BuildError where it cannot be run."""
    name = shlex.join(compiler)
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"compiler {name!r} cannot be run: {error}; {_ANOTHER}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "and says nothing").splitlines()[0]
        raise BuildError(f"{name} --version ends with {done.returncode}: {said}; {_ANOTHER}")
    return done.stdout.splitlines()[0] if done.stdout else name


def build(source: str, target: Target, cache_dir: Path) -> ctypes.CDLL:
    """The kernel `source` as a loaded library, built unless the cache has it; raises BuildError."""
    return build_unit(Unit(source, header_texts(), (*_FLAGS_FAST, *target.flags)), target, cache_dir)


def torch_unit(source: str) -> Unit:
    """C++ that calls torch, compiled against the one that runs."""
    there = Path(torch.__file__).parent
    ending = "dylib" if sys.platform == "darwin" else "so"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = tuple(str(there / "lib" / f"lib{name}.{ending}") for name in ("torch_cpu", "c10"))
    return Unit(f"// torch {torch.__version__}\n{source}", (), (*_FLAGS_TORCH, abi, f"-I{there}/include"), libraries)


def build_unit(unit: Unit, target: Target, cache_dir: Path) -> ctypes.CDLL:
    """`unit` as a loaded library, built with the target's compiler unless the cache has it; raises BuildError.

    The cache key covers all that is compiled and the compiler, so entries are never stale. Where nothing can be
    written to the cache, it is built for this process alone, with one warning.
    """
    if not target.compiler:
        raise BuildError(_no_compiler(Environment.read().cxx))
    name = f"{unit.key(target.compiler)}.so"
    try:
        return _kept(unit, target.compiler, cache_dir / name)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        _warn_not_kept(cache_dir, str(error))
    try:
        with tempfile.TemporaryDirectory() as folder:  # what is loaded does not need its file any more
            return _kept(unit, target.compiler, Path(folder, name))
    except (OSError, NotImplementedError) as error:
        raise BuildError(
            f"no kernel can be built: neither {cache_dir} nor the system's temporary folder can be written ({error}); "
            "set MOEC_CACHE_DIR or TMPDIR to a folder that can"
        ) from error


def _no_compiler(wanted: str | None) -> str:
    if wanted:
        return f"CXX={wanted!r} names no program on the path; expected a C++ compiler, with or without arguments"
    return "no C++ compiler found (looked for g++, clang++, c++); install one, set CXX, or use kernels='eager'"


def _kept(unit: Unit, compiler: tuple[str, ...], path: Path) -> ctypes.CDLL:
    """The library at `path`, built where it is not there; raises OSError where nothing can be written."""
    loaded = _load(path)
    if loaded is not None:
        return loaded
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        loaded = _load(path)  # another process may have built it meanwhile
        if loaded is not None:
            return loaded
        _compile(unit, compiler, path)
        try:
            return _open(path)
        except OSError as error:
            raise BuildError(
                f"{path} was built but cannot be loaded ({error}); check {shlex.join(compiler)!r}, and that programs "
                "may run from that folder or the system's temporary one (TMPDIR)"
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


def _load(path: Path) -> ctypes.CDLL | None:
    """The library, or None where it is missing or damaged (then it is removed, to be built again)."""
    if not path.exists():
        return None
    try:
        if _is_whole(path.read_bytes()):
            return _open(path)
    except OSError:
        pass
    path.unlink(missing_ok=True)
    return None


def _open(path: Path) -> ctypes.CDLL:
    """A library; by a copy of it where programs may not run from its folder, as on a disk mounted so."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        with tempfile.TemporaryDirectory() as folder:  # the process's user alone may write there
            return ctypes.CDLL(shutil.copy(path, folder))


def _seal(library: bytes) -> bytes:
    """What is put behind a library, where loaders do not look: its hash."""
    return _SEAL + sha256(library).digest()


def _is_whole(content: bytes) -> bool:
    """Whether these are all the bytes that were written: to load a library that lacks some may end the process."""
    library = content.rpartition(_SEAL)[0]
    return content == library + _seal(library)


def _compile(unit: Unit, compiler: tuple[str, ...], path: Path) -> None:
    folder = path.with_suffix(".new")  # the lock is held: what lies there is what a killed process left
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        built = _run(unit, compiler, folder)
        with built.open("ab") as file:
            file.write(_seal(built.read_bytes()))
        os.replace(built, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(unit: Unit, compiler: tuple[str, ...], folder: Path) -> Path:
    """The library that a compiler makes of `unit` in `folder`; raises BuildError, OSError for a full disk."""
    text, built = folder / "kernel.cpp", folder / "kernel.so"
    for name, content in ((text.name, unit.source), *unit.headers):
        Path(folder, name).write_text(content)
    command = [*compiler, *unit.flags, str(text), *unit.libraries, "-o", str(built)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(folder)}
        )
    except OSError as error:
        raise BuildError(f"compiler {command[0]!r} cannot be run: {error}; {_ANOTHER}") from error
    if done.returncode != 0:
        Path(folder, "room").write_bytes(bytes(_ROOM))
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error" in line] or lines or ["it says nothing"]
        raise BuildError(
            _without(f"{errors[0]}: the C++ compiler failed; its command was {shlex.join(command)}", folder)
        )
    if not built.exists():
        raise BuildError(_without(f"{shlex.join(command)} wrote no library; {_ANOTHER}", folder))
    return built


def _without(text: str, folder: Path) -> str:
    """`text` with the files of a folder by their names: the same reason is the same text for every kernel."""
    return text.replace(f"{folder}/", "")
