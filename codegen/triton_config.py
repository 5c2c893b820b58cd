"""GpuConfig: the numbers that a GPU kernel is specialised by, and the defaults for a target and sizes.

Letters: T tokens, H hidden, F expert width, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from moec.codegen.plan import Sizes
from moec.errors import CodegenError, ParseError
from moec.gpu.target import gpu_targets
from moec.ir.coding import Coding
from moec.ir.dtypes import DTYPES
from moec.ir.spec import KernelSpec

VARIANTS = ("sorted", "decode")
COMBINES = ("fused", "separate", "atomic")
NATIVE_FP8 = ("sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
WEIGHTS = ("pointers", "descriptors")
_WIDEST, _MOST_STAGES, _MOST_PROGRAMS = 1024, 64, 1 << 16  # more than any GPU holds, less than overflows
_KINDS: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "str": str,
    "bool": {"True": True, "False": False}.__getitem__,
}


class GpuFigures(Protocol):
    """What the defaults ask of a target."""

    @property
    def name(self) -> str:
        """sm_90, gfx942, …"""
        ...

    @property
    def shared_bytes(self) -> int:
        """Shared memory (LDS) that one block may use, in bytes."""
        ...

    @property
    def processors(self) -> int:
        """Multiprocessors (compute units)."""
        ...


@dataclass(frozen=True)
class GpuConfig:
    """The tile of the two grouped products, and how their results meet.

    block_m     rows (pairs) of a tile; an expert's last tile may be partly empty
    block_n     columns of a tile; of a gated projection half of them are a's, half b's
    block_k     depth of one step of the inner loop
    group_m     row tiles that share a pass over the columns, so that weights are reused in the L2 cache
    variant     sorted: pairs are grouped by expert; decode: one token and slot at a time, nothing is sorted
    combine     fused: the last blocks of the down projection's launch add each token's slots, in order;
                separate: a launch of its own does, in the same order; atomic: tiles of the down projection add to one
                row a token in fp32, in any order, and the last blocks only convert it: less memory, but the last
                bits of a result may differ from call to call
    native_fp8  the target converts fp8 (e4m3) itself; else its bits are moved
    weights     pointers: each lane loads its own addresses; descriptors: blocks are loaded by tensor descriptors (TMA)
    programs    0: a tile a program; more: so many programs take one tile after the other (persistent)
    specialized some warps only load, others only multiply; rows are brought into the order of experts first
    tf32        products of fp32 numbers run on tensor cores, which round them to 10 bits: the router's never do
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    variant: str = "sorted"
    combine: str = "fused"
    native_fp8: bool = False
    weights: str = "pointers"
    programs: int = 0
    specialized: bool = False
    tf32: bool = False

    def __post_init__(self) -> None:
        """Raises CodegenError for a number that no kernel takes."""
        for name in ("block_m", "block_n", "block_k"):
            value, least = getattr(self, name), 1 if name == "block_n" and self.variant == "decode" else 16
            if not least <= value <= _WIDEST or value & (value - 1):
                raise CodegenError(f"GpuConfig.{name}={value}: expected a power of two, {least} to {_WIDEST}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise CodegenError(f"GpuConfig.num_warps={self.num_warps}: expected 1, 2, 4, 8 or 16")
        if not 1 <= self.num_stages <= _MOST_STAGES or not 1 <= self.group_m <= _MOST_PROGRAMS:
            raise CodegenError(
                f"GpuConfig: num_stages={self.num_stages}, group_m={self.group_m}; "
                f"expected 1 to {_MOST_STAGES} and 1 to {_MOST_PROGRAMS}"
            )
        if self.variant not in VARIANTS or self.combine not in COMBINES:
            raise CodegenError(
                f"GpuConfig: variant={self.variant!r}, combine={self.combine!r}; "
                f"expected one of {', '.join(VARIANTS)} and one of {', '.join(COMBINES)}"
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.weights not in WEIGHTS or not 0 <= self.programs <= _MOST_PROGRAMS:
            raise CodegenError(
                f"GpuConfig: weights={self.weights!r}, programs={self.programs}; "
                f"expected one of {', '.join(WEIGHTS)} and 0 to {_MOST_PROGRAMS}"
            )
        if self.variant == "decode" and (self.weights != "pointers" or self.programs or self.specialized):
            raise CodegenError(
                "GpuConfig: variant='decode' has weights='pointers', programs=0 and no specialized warps"
            )
        if not self.specialized:
            return
        if self.weights != "descriptors" or not self.programs or self.combine != "separate":
            raise CodegenError(
                "GpuConfig: specialized=True needs weights='descriptors', programs>0, combine='separate'"
            )
        if self.num_warps != 4 or self.block_m < 128:
            # Triton 3.7.1 compiles 8 warps without specialising them, and fails on smaller tiles.
            raise CodegenError(
                f"GpuConfig: specialized=True, num_warps={self.num_warps}, block_m={self.block_m}; "
                "expected 4 warps and block_m of 128 or more"
            )

    def __str__(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    @staticmethod
    def parse(text: str) -> GpuConfig:
        """The configuration that prints as `text`; raises ParseError."""
        kinds = {f.name: _KINDS[str(f.type)] for f in fields(GpuConfig)}
        given = {name: value for name, _, value in (item.partition("=") for item in text.split())}
        if tuple(given) != tuple(kinds):
            raise ParseError(f"configuration {text!r}: expected {' '.join(f'{name}=…' for name in kinds)}")
        try:
            return GpuConfig(**{name: kinds[name](value) for name, value in given.items()})
        except (ValueError, KeyError, CodegenError) as error:
            raise ParseError(f"configuration {text!r}: {error}") from error

    @property
    def needs(self) -> frozenset[str]:
        """The capabilities (`GpuTarget.has`) that a target must have."""
        described = {"tma"} if self.weights == "descriptors" else set[str]()
        return frozenset(described | ({"warp_specialize"} if self.specialized else set()))

    def loop_bytes(self, dtype: str, target: GpuFigures | None = None) -> int:
        """Bytes of shared memory that the inner loop holds: a copy of its operands a stage.

        Where products read registers (all but sm_90's and sm_100's), the last stage needs no copy.
        """
        direct = target is None or (target.name in ("sm_90", "sm_100") and self.block_m >= 64)
        copies = self.num_stages if direct else max(1, self.num_stages - 1)
        return copies * self.block_k * (self.block_m + self.block_n) * DTYPES[dtype].itemsize


def check_target(config: GpuConfig, target: GpuFigures | None) -> GpuConfig:
    """`config`, if the target has what it needs (None: the interpreter, which has all); raises CodegenError."""
    if target is None:
        return config
    if config.tf32 and not has_tf32(target):
        raise CodegenError(f"{target.name} has no tf32 products; use tf32=False")
    lacking = config.needs - next((t.has for t in gpu_targets() if t.name == target.name), frozenset())
    if lacking:
        raise CodegenError(
            f"{target.name} has no {', '.join(sorted(lacking))}, which weights={config.weights!r}, "
            f"specialized={config.specialized} needs; use weights='pointers', specialized=False"
        )
    return config


def default_config(spec: KernelSpec, sizes: Sizes, target: GpuFigures | None = None, tf32: bool = False) -> GpuConfig:
    """The configuration used where no tuning result is known; `tf32` where products of fp32 may be rounded so.

    Raises CodegenError where no kernel multiplies in the spec's dtype.
    """
    dtype = spec.experts.dtype
    if dtype not in DTYPES:
        raise CodegenError(f"no Triton kernel multiplies in {dtype!r}; expected {', '.join(DTYPES)}")
    tf32 = tf32 and dtype == "f32" and has_tf32(target)
    if _few_pairs(sizes):
        config = _decode(spec, sizes, target)
    else:
        rows = -(-sizes.T * sizes.k // max(min(sizes.E, sizes.T * sizes.k), 1))
        short = min(sizes.H, sizes.F) <= 1024
        config = _fitting(_by_rows(rows, "tf32" if tf32 else dtype, target, short), dtype, target)
    return replace(_of_codes(config, spec.experts.coding, target), tf32=tf32)


def _decode(spec: KernelSpec, sizes: Sizes, target: GpuFigures | None) -> GpuConfig:
    """The configuration for few pairs; measured on an H100 (docs/kernels.md).

    Where loads can go to shared memory ahead of their use, many small blocks do, else each holds much in registers.
    """
    stacked_by_columns = spec.experts.layout_in == "kn"
    wide = 1 if spec.experts.dtype == "f32" else 2
    ahead = target is not None and target.name.startswith("sm_") and target.name != "sm_75"
    if not ahead:
        return GpuConfig(16, 16, 256 * wide, num_warps=8, num_stages=1, variant="decode")
    if stacked_by_columns:
        return GpuConfig(16, 64, 32 * wide, num_warps=4, num_stages=3, variant="decode")
    depth, stages = (256, 3) if sizes.H > 2048 else (128, 4)
    return GpuConfig(16, 8, depth * wide, num_warps=4, num_stages=stages, variant="decode")


def sorted_config(config: GpuConfig) -> GpuConfig:
    """`config`, or, where it takes one token at a time, one that sorts the few pairs that there are."""
    if config.variant != "decode":
        return config
    return replace(config, block_n=64, block_k=64, num_warps=4, num_stages=2, variant="sorted")


def has_tf32(target: GpuFigures | None) -> bool:
    """Whether the target's tensor cores take fp32 numbers (the interpreter has none)."""
    return target is not None and target.name.startswith("sm_") and target.name != "sm_75"


def _of_codes(config: GpuConfig, coding: Coding | None, target: GpuFigures | None) -> GpuConfig:
    """`config` for matrices kept as codes: a scale a step wants a second sum beside the first, so half the columns."""
    if coding is None:
        return config
    native = coding.element == "fp8" and target is not None and target.name in NATIVE_FP8
    config = replace(config, native_fp8=native)
    if not coding.columns or config.variant == "decode":
        return config
    most_m, most_n = (64, 64) if _wmma(target) else (64, 128) if target and target.name == "sm_100" else (128, 128)
    smaller = config.block_m > most_m or config.block_n > most_n
    config = replace(config, block_m=min(config.block_m, most_m), block_n=min(config.block_n, most_n))
    return replace(config, num_warps=4, num_stages=2) if smaller and most_m == 64 else config


def _wmma(target: GpuFigures | None) -> bool:
    """RDNA: half the registers a lane of CDNA's, for tiles as large."""
    return target is not None and target.name.startswith("gfx1")


def _few_pairs(sizes: Sizes) -> bool:
    """Whether so few pairs exist that an expert is rarely hit twice: then sorting them gains nothing."""
    return sizes.T * sizes.k <= 32 and max(1, sizes.E // (4 * sizes.k)) + 1 >= sizes.T


def _by_rows(rows: int, dtype: str, target: GpuFigures | None, short: bool) -> GpuConfig:
    """By the mean number of rows of an expert that is hit.

    A tile holds about twice the mean: an expert with one tile more reads its weights once more, and where rows are few
    nothing else takes time. Tiles of sm_90 were measured (docs/kernels.md), the others are modelled on them. `short`: a
    product of few steps, which on sm_90 two blocks side by side hide best, or one with more steps on their way.
    """
    amd = target is not None and target.name.startswith("gfx")
    if dtype == "f32" or (target is not None and target.name == "sm_75"):  # no matrix instruction: sums are many
        return GpuConfig(32, 64, 32, 8, 4, 2) if rows > 16 else GpuConfig(16, 64, 32, 8, 4, 2)
    if dtype == "tf32":
        few = GpuConfig(16, 128, 32, 1, 4, 4) if rows <= 8 else GpuConfig(32, 128, 32, 4, 4, 4)
        many = GpuConfig(64, 128, 32, 8, 4, 3) if rows <= 48 else GpuConfig(128, 128, 32, 8, 8, 3)
        return few if rows <= 24 else many
    wide = target is not None and target.name in ("sm_90", "sm_100")
    depth = 128 if wide else 64
    if rows < 8:
        return GpuConfig(16, 128, depth, 1, 4, 2 if amd else 4)
    if rows <= 24:
        return GpuConfig(32, 128, depth, 4, 4, 2 if amd else 4)
    if rows <= 48:
        return GpuConfig(64, 128, depth, 4, 4, 2 if amd or (wide and short) else 3)
    group = 8 if rows <= 192 else 32  # row tiles of an expert share its weights in the L2 cache
    if amd:
        return GpuConfig(128, 128 if _wmma(target) else 256, 64, group, 8, 2)
    return GpuConfig(128, 256 if wide else 128, 64, group, 8, 4 if wide and short else 3)


def _fitting(config: GpuConfig, dtype: str, target: GpuFigures | None) -> GpuConfig:
    """`config` with as many stages as the target's shared memory holds."""
    limit = target.shared_bytes if target is not None else 96 << 10
    while config.num_stages > 1 and config.loop_bytes(dtype, target) > limit:
        config = replace(config, num_stages=config.num_stages - 1)
    return config
