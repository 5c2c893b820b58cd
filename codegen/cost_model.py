"""The time of a grouped product from figures alone: bytes, tiles, waves, pipeline. Pure; nothing is measured here.

The equations are sympy expressions (`equations`), so that they can be read, printed and changed one by one; they are
evaluated for all configurations at once. They say which configuration is likely fast, not how many microseconds it
takes: docs/cost_model.md says how often they are right.

Letters: T tokens, H hidden, F expert width, E experts, k experts a token; a product multiplies rows[R, K] of each
expert by its matrix [N, K]; block_m × block_n × block_k is a tile.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray

from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig
from moec.gpu.target import GpuTarget
from moec.ir.dtypes import STORED

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Constants:
    """What no data sheet says. The values were set by reason, before any ranking was checked; nothing fits them.

    memory_share   of the memory bandwidth that a kernel reaches at best
    l2_share       of the L2 bandwidth
    group_share    of the peak that warp-group instructions (wgmma, tcgen05, mfma) reach
    warp_share     of the peak that warp instructions (mma.sync) reach where the chip has larger ones, else group_share
    narrow         rate of a product whose tile has fewer than 64 columns, beside that of a wide one
    memory_latency seconds until a load from memory arrives; l2_latency: from L2
    step_cycles    that a step takes one block besides its arithmetic: barrier, addresses, waits
    issue_cycles   that a step keeps the multiprocessor from other blocks
    block_cycles   that a block costs before and after its steps, besides waiting for memory
    launch         seconds of a launch
    l2_keeps       share of L2 that holds what is read again
    overlap        how far arithmetic hides transfers: exponent of the norm of the two, 1 not at all
    """

    memory_share: float = 0.85
    l2_share: float = 0.6
    group_share: float = 0.8
    warp_share: float = 0.6
    narrow: float = 0.7
    memory_latency: float = 7e-7
    l2_latency: float = 2.5e-7
    step_cycles: float = 60.0
    issue_cycles: float = 20.0
    block_cycles: float = 500.0
    launch: float = 3e-6
    l2_keeps: float = 0.6
    overlap: float = 4.0


DEFAULT = Constants()


@dataclass(frozen=True)
class Product:
    """One of the layer's two products: N columns of depth K."""

    columns: int
    depth: int


def products(sizes: Sizes, projections: int = 2) -> tuple[Product, Product]:
    """The first product (`projections` times F columns of depth H) and the second (O columns of depth F)."""
    return Product(projections * sizes.F, sizes.H), Product(sizes.O, sizes.F)


def uniform_histogram(sizes: Sizes, seed: int = 0) -> tuple[int, ...]:
    """Rows of each expert where every token draws k different experts, all alike."""
    draw = random.Random(seed)
    counts = [0] * sizes.E
    for _ in range(sizes.T):
        for e in draw.sample(range(sizes.E), sizes.k):
            counts[e] += 1
    return tuple(counts)


_NAMES = (
    "block_m block_n block_k group_m num_warps num_stages "  # of the configuration
    "columns depth element rows hit tiles "  # of the product and the histogram
    "processors shared reserved registers warps blocks l2 memory l2_bandwidth clock flops group "  # of the target
    "memory_share l2_share group_share warp_share narrow memory_latency l2_latency step_cycles issue_cycles "
    "block_cycles launch l2_keeps overlap"
)


@lru_cache(maxsize=1)
def equations() -> dict[str, sympy.Expr]:
    """The model: each quantity as an expression of the configuration, the product, the target and the constants.

    group is 1 where the tile runs on warp-group instructions, else 0; tiles is Σ ⌈rows of e / block_m⌉; hit counts the
    experts with at least one row.
    """
    s: dict[str, Any] = {name: sympy.Symbol(name, positive=True) for name in _NAMES.split()}
    q = _of_blocks(s)
    return {**q, **_of_waves(s, q)}


def _of_blocks(s: Mapping[str, Any]) -> dict[str, Any]:
    """What blocks hold and how many there are, what one step of a block takes, what all of them move."""
    up, low, top, bottom = sympy.ceiling, sympy.floor, sympy.Max, sympy.Min
    bm, bn, bk, warps, stages = s["block_m"], s["block_n"], s["block_k"], s["num_warps"], s["num_stages"]
    q: dict[str, Any] = {}
    # What a block holds, and how many of them a multiprocessor does.
    q["tile_bytes"] = (bm + bn) * bk * s["element"]
    q["shared_used"] = (stages - 1 + s["group"]) * q["tile_bytes"]
    q["lane_registers"] = bottom(255, 40 + bm * bn / (32 * warps) + (1 - s["group"]) * (bm + bn) * 16 / (32 * warps))
    by_registers = low(s["registers"] / (q["lane_registers"] * 32 * warps))
    by_shared = low(s["shared"] / (q["shared_used"] + s["reserved"]))
    q["resident"] = top(1, bottom(by_registers, by_shared, low(s["warps"] / warps), s["blocks"]))
    # Tile padding: whole tiles are multiplied, full or not.
    q["column_tiles"] = up(s["columns"] / bn)
    q["all_blocks"] = s["tiles"] * q["column_tiles"]
    q["steps"] = up(s["depth"] / bk)
    # One step of one block, in cycles of a multiprocessor.
    share = s["group"] * s["group_share"] + (1 - s["group"]) * s["warp_share"]
    wide = s["narrow"] + (1 - s["narrow"]) * bottom(1, bn / 128)
    a_clock = s["flops"] / s["clock"] / s["processors"]
    q["multiply"] = 2 * bm * bn * bk / (a_clock * share * wide)
    q["from_l2"] = q["tile_bytes"] * s["processors"] * s["clock"] / (s["l2_bandwidth"] * s["l2_share"])
    q["store"] = bm * bn * s["element"] * s["processors"] * s["clock"] / (s["memory"] * s["memory_share"])
    # Pipeline depth: a step's loads were issued stages − 1 steps before.
    q["wait"] = s["l2_latency"] * s["clock"] / top(1, stages - 1)
    # Memory: weights of the experts hit once, again where a pass over the columns outgrows L2; rows in, rows out.
    matrix = s["columns"] * s["depth"] * s["element"]
    passes = up(s["tiles"] / s["hit"] / s["group_m"])
    again = sympy.Piecewise((passes, matrix > s["l2_keeps"] * s["l2"]), (1, True))
    q["bytes"] = s["hit"] * matrix * again + s["rows"] * (s["depth"] + s["columns"]) * s["element"]
    return q


def _of_waves(s: Mapping[str, Any], q: Mapping[str, Any]) -> dict[str, Any]:
    """Wave quantisation: full waves, and a last one that may leave multiprocessors, and memory, idle."""
    up, low, top, bottom = sympy.ceiling, sympy.floor, sympy.Max, sympy.Min
    per_wave = s["processors"] * q["resident"]
    full = low(q["all_blocks"] / per_wave)
    left = q["all_blocks"] - full * per_wave
    p = s["overlap"]
    # Before its first step a block waits for memory and for all that the first step reads; after its last it stores.
    fill = s["memory_latency"] * s["clock"] + s["block_cycles"]
    alone = q["steps"] * (top(q["multiply"], q["wait"]) + s["step_cycles"]) + fill

    def wave(blocks: Any, together: Any) -> Any:
        """A wave's seconds: of its multiprocessors, of one block from first to last, of its share of the bytes.

        Arithmetic and transfers overlap, but not wholly: a p-norm lies between their maximum and their sum. What is
        in flight bounds the rate of transfers (Little's law), as does what one multiprocessor can take in.
        """
        busy = together * (q["steps"] * (top(q["multiply"], q["from_l2"]) + s["issue_cycles"]) + q["store"])
        flying = blocks * top(1, s["num_stages"] - 1) * q["tile_bytes"]
        intake = bottom(blocks, s["processors"]) / s["processors"] * s["l2_bandwidth"] * s["l2_share"]
        rate = bottom(s["memory"] * s["memory_share"], flying / s["memory_latency"], intake)
        moved = q["bytes"] * blocks / q["all_blocks"] / rate
        return ((busy / s["clock"]) ** p + (alone / s["clock"]) ** p + moved**p) ** (1 / p)

    last = wave(top(1, left), top(1, up(left / s["processors"])))
    seconds = full * wave(per_wave, q["resident"]) + bottom(1, left) * last + s["launch"]
    return {"full_waves": full, "seconds": seconds}


@lru_cache(maxsize=8)
def _evaluator(names: tuple[str, ...]) -> Callable[..., Any]:
    q = equations()
    return sympy.lambdify(
        [sympy.Symbol(n, positive=True) for n in _NAMES.split()], [q[n] for n in names], "numpy", cse=True
    )


def quantities(
    configs: Sequence[GpuConfig],
    product: Product,
    histogram: Sequence[int],
    target: GpuTarget,
    dtype: str = "bf16",
    constants: Constants = DEFAULT,
    names: tuple[str, ...] = ("seconds",),
) -> dict[str, Array]:
    """Named quantities of `equations` for every configuration, as arrays."""
    counts = np.asarray([c for c in histogram if c > 0], np.float64)
    fields = ("block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages")
    values: dict[str, Any] = {f: np.asarray([getattr(c, f) for c in configs], np.float64) for f in fields}
    values |= {"columns": product.columns, "depth": product.depth, "element": STORED[dtype].itemsize}
    values |= {"rows": float(counts.sum()), "hit": float(max(1, counts.size))}
    values["tiles"] = np.maximum(1.0, np.ceil(counts[None, :] / values["block_m"][:, None]).sum(1))
    values |= _of_target(target, dtype) | asdict(constants)
    values["group"] = _groups(target, values["block_m"], values["num_warps"])
    if not target.can("wgmma") and not target.can("tcgen05"):
        values["warp_share"] = constants.group_share
    with np.errstate(divide="ignore"):  # what a tile takes nothing of does not limit how many run: that is infinity
        results = _evaluator(names)(*(values[name] for name in _NAMES.split()))
    return {n: np.broadcast_to(np.asarray(r, np.float64), (len(configs),)) for n, r in zip(names, results, strict=True)}


def _of_target(target: GpuTarget, dtype: str) -> dict[str, float]:
    lanes = target.registers if target.backend == "cuda" else target.registers * target.simds * target.warp
    return {
        "processors": target.processors, "shared": target.processor_shared, "reserved": target.reserved_shared,
        "registers": lanes, "warps": target.warps, "blocks": target.blocks, "l2": target.l2, "memory": target.memory,
        "l2_bandwidth": target.l2_bandwidth, "clock": target.clock, "flops": target.flops[dtype],
    }  # fmt: skip


def _groups(target: GpuTarget, block_m: Array, num_warps: Array) -> Array:
    """1 where a tile runs on instructions of a warp group or of the block, which need rows enough; else 0."""
    if not (target.can("wgmma") or target.can("tcgen05")):
        return np.zeros_like(block_m)
    return ((block_m >= (64 if target.can("wgmma") else 128)) & (num_warps >= 4)).astype(np.float64)


@lru_cache(maxsize=64)
def _fitting(configs: tuple[GpuConfig, ...], target: GpuTarget, dtype: str) -> NDArray[np.bool_]:
    fields = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    m, n, k, warps, stages = (np.asarray([getattr(c, f) for c in configs], np.float64) for f in fields)
    held = stages - 1 + _groups(target, m, warps) if target.backend == "cuda" else np.maximum(1, stages - 1)
    sums = m * n / (target.warp * warps)
    step = (m + n) * k * STORED[dtype].itemsize
    return (held * step <= target.shared_bytes) & (sums <= (256 if target.warp == 64 else 200))


def fits(config: GpuConfig, target: GpuTarget, dtype: str = "bf16") -> bool:
    """Whether a configuration can run at all: its stages fit shared memory, its sums fit registers."""
    return bool(_fitting((config,), target, dtype)[0])


def seconds(
    configs: Sequence[GpuConfig],
    sizes: Sizes,
    histogram: Sequence[int],
    target: GpuTarget,
    dtype: str = "bf16",
    constants: Constants = DEFAULT,
    projections: int = 2,
) -> Array:
    """The modelled time of both products for every configuration; infinity where one cannot run."""
    both = (
        quantities(configs, product, histogram, target, dtype, constants)["seconds"]
        for product in products(sizes, projections)
    )
    total = sum(both, np.zeros(len(configs)))
    return np.where(_fitting(tuple(configs), target, dtype), total, np.inf)


def rank(
    configs: Sequence[GpuConfig],
    sizes: Sizes,
    histogram: Sequence[int],
    target: GpuTarget,
    dtype: str = "bf16",
    constants: Constants = DEFAULT,
) -> list[tuple[GpuConfig, float]]:
    """(configuration, modelled seconds), fastest first; those that cannot run are left out."""
    times = seconds(configs, sizes, histogram, target, dtype, constants)
    order = np.argsort(times, kind="stable")
    return [(configs[i], float(times[i])) for i in order if np.isfinite(times[i])]


def least_bytes(sizes: Sizes, histogram: Sequence[int], dtype: str = "bf16", projections: int = 2) -> dict[str, int]:
    """The bytes that any fused layer moves: weights of the experts hit once, x once, h written and read, y once."""
    each, hit, rows = STORED[dtype].itemsize, sum(c > 0 for c in histogram), sum(histogram)
    weights = hit * (projections * sizes.H + sizes.O) * sizes.F * each
    return {
        "weights": weights,
        "x": sizes.T * sizes.H * each,
        "h": 2 * rows * sizes.F * each,
        "y": sizes.T * sizes.O * each,
    }


_CONVERTED = {"int8": 0.52, "fp8": 0.37}  # measured on an H100, of two layers (docs/kernels.md)


def rows_past_codes(target: GpuTarget, dtype: str, element: str) -> float:
    """Rows an expert from which its matrices in 16 bits are no slower to multiply by than as codes of a byte.

    Codes halve what is read. From half as many rows as make a product (2 operations a row and number) take as long as
    reading the matrix, arithmetic alone takes longer than reading codes; converting them in the loop comes on top, so
    that it is a share of those rows.
    """
    rows = STORED[dtype].itemsize * target.flops.get(dtype, target.flops["f32"]) / (4 * target.memory)
    return _CONVERTED[element] * rows


def tile_of(config: GpuConfig) -> tuple[int, int, int]:
    """What ranking by tiles compares: block_m, block_n, block_k."""
    return config.block_m, config.block_n, config.block_k
