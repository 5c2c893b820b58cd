"""Calls made again without Python, by codegen/calls.cpp, and the memory that kernels work in, which it owns.

A call of `moec::moe` or `moec::experts` on a CPU goes there first. One that is not known comes back to Python's ops,
which run it and say what to keep (`Calls.remember`): its kernel, the words it was called with, and where among them
addresses differ from call to call.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

from moec.codegen import build
from moec.errors import MoecError
from moec.options import Environment
from moec.target import Target

_SOURCE = Path(build.__file__).resolve().with_name("calls.cpp")
_MOST = 4096  # calls that are kept: layers times numbers of tokens


@dataclass(frozen=True)
class About:
    """A kept call, in the order of `About` in calls.cpp; dtypes are codes of `Args`.

    workspace                      bytes
    work, x, y, experts, weights,  places among the words of the addresses that are each call's own
      logits
    y_dtype, weights_dtype,        of results
      logits_dtype
    wide, logits_wide              columns of y, of logits
    """

    workspace: int
    work: int
    x: int
    y: int
    experts: int
    weights: int
    logits: int
    y_dtype: int
    weights_dtype: int
    logits_dtype: int
    wide: int
    logits_wide: int


class Calls:
    """The loaded library. Thread-safe; a workspace is each thread's own."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._remember = library.moec_remember
        self._remember.restype = ctypes.c_int64
        self._remember.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self._forget, self._release = library.moec_forget, library.moec_release_workspace
        self._workspace = library.moec_workspace
        self._workspace.restype, self._workspace.argtypes = ctypes.c_void_p, [ctypes.c_int64]
        self._bytes = library.moec_workspace_bytes
        self._bytes.restype = ctypes.c_int64
        self._alive: list[object] = []
        library.moec_serve()

    def remember(self, kernel: int, words: array[int], about: About, alive: object) -> None:
        """Keep the call that is being made on this thread if it came by calls.cpp; `alive`: what its words point to."""
        if len(self._alive) >= _MOST:
            self.forget()
        said = array("q", astuple(about))
        if self._remember(kernel, words.buffer_info()[0], len(words), said.buffer_info()[0]):
            self._alive.append(alive)

    def forget(self) -> None:
        """Let go of all calls, once none of them runs."""
        alive, self._alive = self._alive, []
        self._forget()
        del alive  # not before

    def workspace(self, size: int) -> int:
        """The page-aligned address of at least `size` bytes that stay this thread's; raises MoecError without them."""
        address: int | None = self._workspace(size)
        if address is None:
            raise MoecError(f"no memory for a kernel's workspace of {size:,} bytes; call the layer with fewer tokens")
        return address

    @property
    def workspace_bytes(self) -> int:
        """How large this thread's workspace is."""
        return int(self._bytes())

    def release(self) -> None:
        """Free what this thread's kernels keep for their next call."""
        self._release()


_LOADING = threading.Lock()  # it is loaded once, whichever thread is first: it serves the whole process


def calls() -> Calls:
    """The library, built for the torch that runs unless the cache has it; raises BuildError."""
    with _LOADING:
        return _load()


@lru_cache(maxsize=1)
def _load() -> Calls:
    unit = build.torch_unit(_SOURCE.read_text())
    return Calls(build.build_unit(unit, Target.host(), Environment.read().cache_dir))


def forget() -> None:
    """Let go of all kept calls: kernels that are loaded anew are to be asked for again."""
    if _load.cache_info().currsize:
        calls().forget()


def kernel_library(source: str, target: Target) -> ctypes.CDLL:
    """A kernel's library, built unless the cache has it, and meanwhile that of calls; raises BuildError."""
    folder = Environment.read().cache_dir
    if _load.cache_info().currsize:
        return build.build(source, target, folder)
    with ThreadPoolExecutor(1) as thread:
        beside = thread.submit(calls)
        built = build.build(source, target, folder)
        beside.result()
    return built
