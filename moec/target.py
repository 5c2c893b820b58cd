"""Target: what kernels are generated for. `Target.host()` and `gpu_figures` are the only places that ask hardware."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moec.errors import OptionError
from moec.gpu.target import family_of
from moec.options import Environment


@dataclass(frozen=True)
class Target:
    """A CPU and the compiler for it.

    lanes         floats in a vector
    tile_rows     rows × vectors of accumulators in the packed micro-kernel: as many as there are registers for
    tile_vectors
    dot_rows      rows of x that the dot kernel takes against 4 rows of weights
    bf16_pairs    bf16 is multiplied in pairs into fp32 sums, without conversion
    tiles         many rows of such pairs meet packed weights in tiles (AMX), few in vectors
    flags         what the compiler is told
    compiler      the command of the C++ compiler, its path first; empty: there is none
    processor     its name, for people and for what was measured on it
    """

    isa: str
    lanes: int
    tile_rows: int
    tile_vectors: int
    dot_rows: int
    bf16_pairs: bool
    flags: tuple[str, ...]
    threads: int = 1
    l1_bytes: int = 32 << 10
    l2_bytes: int = 512 << 10
    compiler: tuple[str, ...] = ()
    processor: str = ""
    tiles: bool = False

    @staticmethod
    def host() -> Target:
        """This machine, with the best instruction set it has or the one the environment asks for.

        Raises OptionError where the environment names an instruction set that is unknown or that the host lacks.
        """
        env = Environment.read()
        return _host(env.cpu_isa, env.cxx)

    def emulating(self, isa: str) -> Target:
        """The kernels of `isa`, built with this target's own instructions and small tiles: slow, for tests."""
        own = {"flags": self.flags, "tile_rows": 3, "dot_rows": 2, **_machine(self)}
        return replace(_ISAS[isa], **own)


def _machine(target: Target) -> dict[str, Any]:
    names = ("threads", "l1_bytes", "l2_bytes", "compiler", "processor")
    return {name: getattr(target, name) for name in names}


_AVX512_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_WIDE = "-mprefer-vector-width=512"
_PAIRS_FLAGS = (*_AVX512_FLAGS, "-mavx512bf16", _WIDE)

# Best first. 16 registers hold 6x2 or 3x4 accumulators, 32 hold 12x2 or 6x4, with room for operands.
_ISAS: Mapping[str, Target] = {
    t.isa: t
    for t in (
        Target("amx_bf16", 16, 12, 2, 6, True, (*_PAIRS_FLAGS, "-mamx-tile", "-mamx-bf16"), tiles=True),
        Target("avx512_bf16", 16, 12, 2, 6, True, _PAIRS_FLAGS),
        Target("avx512", 16, 12, 2, 6, False, (*_AVX512_FLAGS, _WIDE)),
        Target("avx2", 8, 6, 2, 3, False, ("-mavx2", "-mfma", "-mf16c")),
        Target("neon", 4, 6, 4, 4, False, ("-march=armv8.2-a+fp16",)),
        Target("plain", 4, 6, 2, 3, False, ()),
    )
}

_DEVICES: Mapping[str, tuple[str, ...]] = {"cpp": ("cpu",)}


def kernel_devices(engine: str) -> tuple[str, ...]:
    """The types of device that the kernels of an engine run on."""
    return _DEVICES.get(engine, ("cpu", "cuda"))


_AVX512_NEEDS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "amx_bf16": (*_AVX512_NEEDS, "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512_bf16": (*_AVX512_NEEDS, "avx512_bf16"),
    "avx512": _AVX512_NEEDS,
    "avx2": ("avx2", "fma3", "f16c"),
    "neon": ("neon",),
    "plain": (),
}


def supported_isas(capabilities: Mapping[str, Any]) -> tuple[str, ...]:
    """The instruction sets, best first, of a machine with these `torch.cpu.get_capabilities()`."""
    arm = capabilities.get("architecture") in ("aarch64", "arm64")
    have = {**capabilities, "neon": arm}
    return tuple(isa for isa in _ISAS if all(have.get(need, False) for need in _NEEDS[isa]))


_ASK_FOR_STATE, _TILE_DATA = 0x1023, 18  # ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA of <asm/prctl.h>
_ARCH_PRCTL = 158  # the system call's number on x86-64


@lru_cache(maxsize=1)
def may_use_tiles() -> bool:
    """Whether Linux lets this process use tiles (AMX), which it must be asked for once; an older kernel never does."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype, call.argtypes = ctypes.c_long, [ctypes.c_long, ctypes.c_long, ctypes.c_long]
    return call(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA) == 0


@lru_cache(maxsize=8)
def _host(wanted: str | None, cxx: str | None) -> Target:
    capabilities = torch.cpu.get_capabilities()
    supported = supported_isas(capabilities)
    if "amx_bf16" in supported and not may_use_tiles():
        supported = tuple(isa for isa in supported if isa != "amx_bf16")
    if wanted is not None and wanted not in supported:
        problem = "this host cannot run it" if wanted in _ISAS else "it is unknown"
        raise OptionError(f"MOEC_CPU_ISA={wanted!r}: {problem}; expected one of {', '.join(supported)}")
    return replace(
        _ISAS[wanted or supported[0]],
        threads=int(capabilities.get("num_physical_cores") or os.cpu_count() or 1),
        l1_bytes=int(capabilities.get("l1d_cache_size") or 32 << 10),
        l2_bytes=int(capabilities.get("l2_cache_size") or 512 << 10),
        compiler=find_compiler(cxx),
        processor=processor_name(),
    )


@lru_cache(maxsize=1)
def processor_name() -> str:
    """The processor as the operating system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def find_compiler(cxx: str | None) -> tuple[str, ...]:
    """The command of the C++ compiler: the one named, else g++, clang++ or c++; empty where there is none.

    `cxx` is one program, or a program and arguments as a shell would split them (`ccache g++`).
    """
    commands = [(cxx,), _words(cxx)] if cxx else [("g++",), ("clang++",), ("c++",)]
    found = ((shutil.which(command[0]), command[1:]) for command in commands if command)
    return next(((path, *arguments) for path, arguments in found if path), ())


def _words(command: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(command))
    except ValueError:  # a quotation that does not end
        return ()


@dataclass(frozen=True)
class GpuFigures:
    """What defaults for a GPU's kernels depend on: its architecture (sm_90, gfx942), a block's shared memory, its
    multiprocessors, the product's name. They are the device's own: two products of one architecture differ.
    """

    name: str
    shared_bytes: int
    processors: int
    chip: str = ""


@lru_cache(maxsize=64)
def gpu_figures(device: torch.device) -> GpuFigures:
    """The figures of a CUDA or ROCm device, from its driver."""
    found = torch.cuda.get_device_properties(device)
    processors, shared = found.multi_processor_count, found.shared_memory_per_block
    if torch.version.hip:
        return GpuFigures(family_of(found.gcnArchName.partition(":")[0]), shared, processors, found.name)
    shared = getattr(found, "shared_memory_per_block_optin", shared)
    return GpuFigures(family_of(f"sm_{found.major}{found.minor}"), shared, processors, found.name)
