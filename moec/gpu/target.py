"""GpuTarget: what a GPU can do, in figures of its vendor's public documents. Nothing here asks a device.

Where the figures come from:
  NVIDIA limits a multiprocessor (registers, shared memory, warps, blocks): CUDA C++ Programming Guide, "Compute
    Capabilities", tables "Technical Specifications per Compute Capability", and the tuning guides of each architecture.
  NVIDIA chips: data sheets and architecture white papers of Tesla T4 (Turing), A100 (Ampere), A10, L40S (Ada), H100 and
    H200 (Hopper), HGX B200 (Blackwell), GeForce RTX 5090 (RTX Blackwell). Rates are dense, without sparsity, with fp32
    accumulation.
  AMD chips: data sheets and white papers of MI250X (CDNA 2, one of its two dies), MI300X (CDNA 3), MI355X (CDNA 4),
    RX 7900 XTX (RDNA 3), RX 9070 XT (RDNA 4); limits a compute unit: the ISA guides, and LLVM's AMDGPU back end.
  L2 bandwidth: vendors give bytes a clock for few chips (A100: 5120, in its white paper); the others are that figure
    scaled by multiprocessors and clock, or AMD's 128 bytes a clock and channel: upper bounds.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from moec.errors import OptionError

GpuBackend = Literal["cuda", "hip"]
_KB = 1 << 10
_MB = 1 << 20


@dataclass(frozen=True)
class GpuTarget:
    """One GPU: its instruction set, its limits and its rates.

    name            how it is asked for, for example sm_90 or h200
    arch            what the compiler calls it: 90 for sm_90, "gfx942"
    chip            the product whose rates these are
    warp            lanes of a warp (wavefront)
    processors      multiprocessors (SMs, compute units)
    shared_bytes    shared memory that one block may use, bytes
    processor_shared  shared memory of a multiprocessor, bytes
    reserved_shared bytes of it that the system keeps for each block
    registers       32-bit registers of a multiprocessor (AMD: per lane of one SIMD)
    register_unit   registers are given out to a warp in multiples of this many a lane
    max_registers   registers a lane can address
    warps           resident warps a multiprocessor
    blocks          resident blocks a multiprocessor
    simds           SIMD units a multiprocessor: warps and AMD's registers divide over them
    l2              last cache before memory shared by all multiprocessors, bytes
    memory, l2_bandwidth   bytes a second
    clock           Hz at which `flops` holds
    flops           operations a second by dtype of the operands: f32, tf32, f16, bf16, fp8, int8
    has             capabilities: cp_async, tma, tma_gather, wgmma, tcgen05, warp_specialize, mfma, wmma, bf16, fp8
    """

    name: str
    backend: GpuBackend
    arch: int | str
    chip: str
    warp: int
    processors: int
    shared_bytes: int
    processor_shared: int
    reserved_shared: int
    registers: int
    register_unit: int
    max_registers: int
    warps: int
    blocks: int
    simds: int
    l2: int
    memory: float
    l2_bandwidth: float
    clock: float
    flops: Mapping[str, float]
    has: frozenset[str]

    def __hash__(self) -> int:
        return hash(self.name)

    def can(self, *capabilities: str) -> bool:
        """Whether the target has all of these."""
        return self.has.issuperset(capabilities)


def _cuda(
    name: str,
    chip: str,
    processors: int,
    shared_bytes: int,
    shared: int,
    warps: int,
    blocks: int,
    l2: int,
    memory: float,
    clock: float,
    tera: Mapping[str, float],
    has: str,
) -> GpuTarget:
    arch = int(name.removeprefix("sm_"))
    return GpuTarget(
        *(name, "cuda", arch, chip, 32, processors, shared_bytes * _KB, shared * _KB),
        *(0 if arch < 80 else _KB, 1 << 16, 8, 255, warps, blocks, 4, l2 * _MB, memory * 1e9),
        *(_L2_BYTES_A_CLOCK * processors * clock * 1e9, clock * 1e9),
        {dtype: rate * 1e12 for dtype, rate in tera.items()},
        frozenset(has.split()),
    )


_L2_BYTES_A_CLOCK = 5120 / 108  # a multiprocessor: A100's L2 reads 5120 bytes a clock for 108 of them


def _hip(
    name: str,
    chip: str,
    processors: int,
    shared: int,
    lanes: tuple[int, int, int],
    warps: int,
    l2: int,
    memory: float,
    l2_bandwidth: float,
    clock: float,
    tera: Mapping[str, float],
    has: str,
) -> GpuTarget:
    warp, registers, unit = lanes
    simds = 4 if warp == 64 else 2
    return GpuTarget(
        *(name, "hip", name, chip, warp, processors, shared * _KB, shared * _KB),
        *(0, registers, unit, 512 if warp == 64 else 256, warps, 32, simds, l2 * _MB, memory * 1e9, l2_bandwidth * 1e9),
        *(clock * 1e9, {dtype: rate * 1e12 for dtype, rate in tera.items()}, frozenset(has.split())),
    )


def _rates(
    f32: float, half: float, tf32: float = 0, int8: float = 0, fp8: float = 0, bf16: float = 0
) -> dict[str, float]:
    """Rates by dtype, in 10^12 a second. What the matrix units lack (0) runs at the rate of what it is converted to."""
    return {
        "f32": f32,
        "tf32": tf32 or f32,
        "f16": half,
        "bf16": bf16 or half,
        "fp8": fp8 or half,
        "int8": int8 or half,
    }


_AMPERE = "bf16 cp_async"
_ADA = "bf16 cp_async fp8"
_HOPPER = "bf16 cp_async fp8 tma wgmma warp_specialize"
_BLACKWELL = "bf16 cp_async fp8 tma tma_gather tcgen05 warp_specialize"
_RTX = "bf16 cp_async fp8 tma"
_CDNA3 = "bf16 mfma fp8"
_RDNA4 = "bf16 wmma fp8"

_CDNA, _RDNA = (64, 512, 8), (32, 1536, 24)

_ARCHITECTURES: tuple[GpuTarget, ...] = (
    _cuda("sm_75", "Tesla T4", 40, 64, 64, 32, 16, 4, 320, 1.59, _rates(8.1, 65, 0, 130, bf16=8.1), ""),
    _cuda("sm_80", "A100 SXM", 108, 163, 164, 64, 32, 40, 2039, 1.41, _rates(19.5, 312, 156, 624), _AMPERE),
    _cuda("sm_86", "A10", 72, 99, 100, 48, 16, 6, 600, 1.695, _rates(31.2, 125, 62.5, 250), _AMPERE),
    _cuda("sm_89", "L40S", 142, 99, 100, 48, 24, 96, 864, 2.52, _rates(91.6, 362, 183, 733, 733), _ADA),
    _cuda("sm_90", "H100 SXM", 132, 227, 228, 64, 32, 50, 3352, 1.83, _rates(66.9, 989.4, 494.7, 1979, 1979), _HOPPER),
    _cuda("sm_100", "B200", 148, 227, 228, 64, 32, 126, 7700, 1.85, _rates(75, 2250, 1125, 4500, 4500), _BLACKWELL),
    _cuda("sm_120", "RTX 5090", 170, 99, 100, 48, 24, 96, 1792, 2.41, _rates(104.8, 209.5, 104.8, 838, 419), _RTX),
    _hip("gfx90a", "MI250X (one die)", 110, 64, _CDNA, 32, 8, 1638, 6900, 1.7, _rates(47.9, 191.5), "bf16 mfma"),
    _hip("gfx942", "MI300X", 304, 64, _CDNA, 32, 32, 5300, 34400, 2.1, _rates(163.4, 1307, 653.7, 2615, 2615), _CDNA3),
    _hip("gfx950", "MI355X", 256, 160, _CDNA, 32, 32, 8000, 39300, 2.4, _rates(157.3, 2516.6, 0, 5033, 5033), _CDNA3),
    _hip("gfx1100", "RX 7900 XTX", 96, 64, _RDNA, 32, 6, 960, 5000, 2.5, _rates(61.4, 122.8), "bf16 wmma"),
    _hip("gfx1201", "RX 9070 XT", 64, 64, _RDNA, 32, 8, 644, 5000, 2.97, _rates(48.7, 195, 0, 389, 389), _RDNA4),
)  # fmt: skip


def _chips() -> tuple[GpuTarget, ...]:
    """Products that share an architecture above and differ in their figures."""
    named = {target.name: target for target in _ARCHITECTURES}
    h100, mi300x = named["sm_90"], named["gfx942"]
    return (
        replace(h100, name="h200", chip="H200 SXM 141GB", memory=4.8e12),
        replace(h100, name="h20", chip="H20", processors=78, memory=4.0e12, flops=_scaled(h100, 148 / 989.4)),
        replace(mi300x, name="mi325x", chip="MI325X", memory=6.0e12),
    )


def _scaled(target: GpuTarget, by: float) -> dict[str, float]:
    return {dtype: rate * by for dtype, rate in target.flops.items()}


# What people also call them.
_ALSO = {
    "t4": "sm_75", "a100": "sm_80", "a10": "sm_86", "l40s": "sm_89", "h100": "sm_90", "b200": "sm_100",
    "rtx5090": "sm_120", "mi250x": "gfx90a", "mi300x": "gfx942", "mi355x": "gfx950", "rx7900xtx": "gfx1100",
    "rx9070xt": "gfx1201",
}  # fmt: skip


def gpu_targets() -> tuple[GpuTarget, ...]:
    """Every architecture, one chip each; oldest first, NVIDIA's before AMD's."""
    return _ARCHITECTURES


def family_of(name: str) -> str:
    """The architecture above that a device's own is treated as: itself, or one of its family that is not newer.

    sm_103 is sm_100's family, gfx941 gfx942's. A device of no known family keeps its name, and with it the defaults of
    no GPU in particular: it has none of the capabilities that an option may ask for.
    """
    names = [target.name for target in _ARCHITECTURES]
    if name in names:
        return name
    if name.startswith("gfx"):
        return {"gfx940": "gfx942", "gfx941": "gfx942"}.get(name, name)
    own = int(name.removeprefix("sm_"))
    if own < 75:
        return "sm_75"  # no bf16, no asynchronous copies
    older = [int(n.removeprefix("sm_")) for n in names if n.startswith("sm_")]
    same = [n for n in older if n // 10 == own // 10 and n <= own]
    return f"sm_{max(same)}" if same else name


def gpu_target(name: str) -> GpuTarget:
    """The target of this name: an architecture (sm_90, gfx942) or a chip (h200).

    Raises OptionError with the nearest valid name.
    """
    known = {target.name: target for target in (*_ARCHITECTURES, *_chips())}
    wanted = name.strip().lower().replace("-", "_")
    wanted = _ALSO.get(wanted, wanted)
    spelled = f"sm_{wanted[2:].lstrip('_')}" if wanted.startswith("sm") else wanted
    if spelled in known:
        return known[spelled]
    near = difflib.get_close_matches(spelled, [*known, *_ALSO], n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise OptionError(f"target {name!r} is unknown{hint}; expected one of {', '.join(known)}")
