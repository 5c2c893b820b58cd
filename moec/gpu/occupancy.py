"""Theoretical occupancy: how many blocks a multiprocessor holds, and what limits them. Pure.

Source: CUDA C++ Best Practices Guide, "Occupancy" (the rules of NVIDIA's occupancy calculator); for AMD the rules for
registers and LDS of the CDNA and RDNA ISA guides.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.gpu.target import GpuTarget


@dataclass(frozen=True)
class Occupancy:
    """Blocks a multiprocessor, resident warps as a share of the most possible, and the limit that binds.

    limit: registers, shared memory, warps or blocks; `blocks` is 0 where not even one fits.
    """

    blocks: int
    share: float
    limit: str


def occupancy(target: GpuTarget, warps: int, registers: int, shared: int) -> Occupancy:
    """Of a kernel with `warps` warps a block, `registers` a lane and `shared` bytes a block."""
    limits = {
        "registers": _by_registers(target, warps, registers),
        "shared memory": _by_shared(target, shared),
        "warps": target.warps // warps,
        "blocks": target.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    blocks = limits[limit]
    return Occupancy(blocks, blocks * warps / target.warps, limit)


def _by_registers(target: GpuTarget, warps: int, registers: int) -> int:
    if registers > target.max_registers:
        return 0
    unit = target.register_unit
    each = max(unit, -(-registers // unit) * unit)
    if target.backend == "hip":  # a wave takes from its SIMD's own file
        waves = min(target.warps // target.simds, target.registers // each)
        return waves * target.simds // warps
    of_simd = target.registers // target.simds // (each * target.warp)
    return of_simd * target.simds // warps


def _by_shared(target: GpuTarget, shared: int) -> int:
    if shared > target.shared_bytes:
        return 0
    taken = shared + target.reserved_shared
    return target.processor_shared // taken if taken else target.blocks
