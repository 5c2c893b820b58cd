"""The numbers of a CPU plan that can be tuned: their defaults, their text, and the candidates worth measuring. Pure.

Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token. Pairs of numbers
are for the two phases: the projections into the experts, and out of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial

from moec.errors import ParseError
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.target import Target

_STREAMED = 192  # rows an expert at most, however large the second cache is
_FEW_BEFORE_TILES = 8
TILE, _TILE_BYTES = 16, 64  # rows of a tile, and bytes of each: what tiles.hpp calls TILE, and 2 * TILE_DEPTH
_MOST = 1 << 24  # no tuned number is larger: a foreign text must not make a plan ask for a huge workspace


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call; without O, experts give rows as wide as they read them."""

    T: int
    H: int
    F: int
    E: int
    k: int
    O: int = 0

    def __post_init__(self) -> None:
        if not self.O:
            object.__setattr__(self, "O", self.H)


@dataclass(frozen=True)
class Tuning:
    """The numbers of a plan that change how fast it is and nothing else.

    few        up to this many rows an expert its weights are streamed as stored, above they are packed
    few_cols   columns of a task that streams; multiples of 16
    many_cols  columns of a task that packs; multiples of 16
    row_block  rows of a task
    k_few      K is cut into blocks of this size where weights are streamed; even
    k_many     and of these where they are packed; even
    chunk      tokens at a time, which bounds the workspace
    """

    few: tuple[int, int]
    few_cols: tuple[int, int]
    many_cols: tuple[int, int]
    row_block: int
    k_few: int
    k_many: tuple[int, int]
    chunk: int

    def __post_init__(self) -> None:
        for name, least, step in _RULES:
            value = getattr(self, name)
            for n in value if isinstance(value, tuple) else (value,):
                if not least <= n <= _MOST or n % step:
                    raise ParseError(f"tuning {name}={n}: expected {least} to {_MOST}, a multiple of {step}")

    def __str__(self) -> str:
        return " ".join(f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self))

    @staticmethod
    def parse(text: str) -> Tuning:
        """The tuning that prints as `text`; raises ParseError."""
        values: dict[str, int | tuple[int, int]] = {}
        for item in text.split():
            name, _, value = item.partition("=")
            values[name] = _number(name, value)
        if tuple(values) != tuple(f.name for f in fields(Tuning)):
            known = " ".join(f"{f.name}=…" for f in fields(Tuning))
            raise ParseError(f"tuning {text!r}: expected {known}")
        return Tuning(**values)  # type: ignore[arg-type]


_PAIRS = ("few", "few_cols", "many_cols", "k_many")
# What kernels rely on: (field, least, multiple of). Vectors have at most 16 lanes; bf16 is multiplied in pairs.
_RULES = (
    *(("few", 0, 1), ("few_cols", 16, 16), ("many_cols", 16, 16)),
    *(("row_block", 1, 1), ("k_few", 2, 2), ("k_many", 2, 2), ("chunk", 1, 1)),
)


def _text(value: int | tuple[int, int]) -> str:
    return f"{value[0]},{value[1]}" if isinstance(value, tuple) else str(value)


def _number(name: str, text: str) -> int | tuple[int, int]:
    parts = text.split(",")
    if len(parts) != (2 if name in _PAIRS else 1) or not all(
        p.isascii() and p.isdigit() and len(p) < 10 for p in parts
    ):
        raise ParseError(f"tuning {name}={text!r}: expected {'two numbers' if name in _PAIRS else 'a number'}")
    return (int(parts[0]), int(parts[1])) if name in _PAIRS else int(parts[0])


def pairs_of_bf16(spec: ExpertsSpec, target: Target) -> bool:
    """Whether the experts' arithmetic takes bf16 in pairs instead of converting to fp32."""
    return target.bf16_pairs and spec.dtype == "bf16" and not spec.codes


def in_tiles(spec: ExpertsSpec, target: Target) -> bool:
    """Whether many rows of bf16 meet packed weights in tiles (AMX)."""
    return target.tiles and pairs_of_bf16(spec, target)


def tile_room(rows: int, depth: int) -> int:
    """Bytes for copies of `rows` rows of at most `depth` numbers that are to be read in tiles: `TileRows::room`."""
    return -(-rows // TILE) * TILE * (2 * depth // _TILE_BYTES | 1) * _TILE_BYTES


def row_bytes(spec: ExpertsSpec, target: Target) -> int:
    """Of a number of the rows that meet weights: bf16 where it is multiplied in pairs, else a float."""
    return 2 if pairs_of_bf16(spec, target) else 4


def default_tuning(spec: KernelSpec, sizes: Sizes, target: Target, threads: int) -> Tuning:
    """What is used where nothing was measured."""
    e = spec.experts
    into, out = e.layout_in, e.layout_out
    hits = min(sizes.E, sizes.T * sizes.k)
    many_cols = partial(_many_cols, e, target, hits / threads)
    return Tuning(
        few=(_few_rows(e, into, target), _few_rows(e, out, target)),
        few_cols=(_few_cols(into, hits, sizes.F, threads), _few_cols(out, hits, sizes.O, threads)),
        many_cols=(many_cols(into, sizes.F), many_cols(out, sizes.O)),
        row_block=row_block(e, target),
        k_few=_few_depth(e.dtype, target),
        k_many=(_many_depth(e, into, target), _many_depth(e, out, target)),
        chunk=_chunk(sizes),
    )


def row_block(spec: ExpertsSpec, target: Target) -> int:
    """Rows of a task.

    With long vectors (Zen 4) 512 take 0.92 × the time of 192 where 256 to 512 rows of bf16 meet matrices 1024 deep, and
    the same within noise where they are 2048 deep or fp32, forward; backward 0.82 to 0.97 ×. Not measured for tiles.
    """
    return 512 if target.lanes >= 16 and not in_tiles(spec, target) else 192


def _few_depth(dtype: str, target: Target) -> int:
    """K of a block of rows that are streamed."""
    return 1024 if dtype == "f32" and target.lanes < 16 else 2048


def _many_cols(e: ExpertsSpec, target: Target, hits: float, layout: str, columns: int) -> int:
    """Columns of a task that packs, for `hits` experts a thread. Tiles are so fast that copies of rows for them want
    more, where that leaves each thread four tasks.
    """
    if in_tiles(e, target):
        return next((cols for cols in (256, 128) if hits * columns >= 4 * cols), 64)
    return 64 if layout == "nk" else 128


def _many_depth(e: ExpertsSpec, layout: str, target: Target) -> int:
    """K of a packed block. Rows of 16-bit numbers want 2 KB at a time: 1024 takes 0.90 to 0.95 × the time of 256.

    For tiles a block of 32 columns fills two thirds of a first cache of 48 KB, and sums come from memory seldom.
    """
    if in_tiles(e, target):
        return 512
    if layout == "kn":
        return 128
    return 256 if e.dtype == "f32" or e.codes else 1024


def _few_rows(e: ExpertsSpec, layout: str, target: Target) -> int:
    """Of an expert's matrices as they are kept: columns of codes are packed for any number of rows."""
    scaled = e.coding is not None and e.coding.scaled
    return 0 if scaled and layout == "kn" else few_rows(layout, e, target)


def few_rows(layout: str, e: ExpertsSpec, target: Target) -> int:
    """Up to how many rows an expert its weights are streamed as stored; above, packing pays.

    Measured on AVX2 (dot_rows 3), one thread, GFLOP/s streamed / packed: nk f32 76/63 at 24 rows, 73/76 at 48; nk bf16
    72/60 at 24, 66/64 at 40. kn f32 streams as fast in cache, but a whole layer B of 16 rows an expert took 1.35 × the
    time. On AVX-512 (Zen 4), where 32 registers hold what 6 rows of x and 4 of W need, streaming wins while the rows
    stay in the second cache: nk f32 103/89 at 64, pairs of bf16 207/179 at 128; kn f32 106/97 at 64, pairs 197/190.
    In front of tiles packing costs about what eight rows do in vectors: counted in instructions, not measured.
    """
    if target.lanes < 16:
        return 8 if layout == "kn" else 13 * target.dot_rows
    if in_tiles(e, target):
        return _FEW_BEFORE_TILES
    row = _few_depth(e.dtype, target) * row_bytes(e, target)
    return min(_STREAMED, target.l2_bytes * 3 // 4 // row)


def _few_cols(layout: str, hits: int, columns: int, threads: int) -> int:
    """Columns of a task that streams weights: as many as leave each thread eight tasks, for long runs of memory."""
    for cols in (64, 32) if layout == "nk" else (256, 128, 64):
        if hits * columns >= 8 * threads * cols:
            return cols
    return 16 if layout == "nk" else 64


def _chunk(sizes: Sizes) -> int:
    """Tokens at a time: a workspace of about 128 MB, but enough rows an expert to reuse its weights."""
    per_token = sizes.k * (sizes.O + sizes.F) * 4
    return min(_MOST, max((128 << 20) // max(per_token, 1), 128 * sizes.E // max(sizes.k, 1), 1))


# --- candidates ---------------------------------------------------------------------------------------------------


_MUCH_SLOWER = 1.5  # the model is a sketch: it may only rule out what it finds this much worse than its best


@lru_cache(maxsize=256)
def candidates(
    spec: KernelSpec, sizes: Sizes, target: Target, threads: int, limit: int = 32, slowest: float = _MUCH_SLOWER
) -> tuple[Tuning, ...]:
    """The default, then at most `limit` - 1 others worth measuring, the most promising first.

    Left out: what does not fit the caches, what equals another at these sizes, what by the model takes more than
    `slowest` times the best one's time.
    """
    default = default_tuning(spec, sizes, target, threads)
    known = {_effective(default, sizes)}
    found: list[tuple[float, int, Tuning]] = []
    for moved in _moves(spec, sizes, target, default):
        effective = _effective(moved, sizes)
        if effective in known or not _fits(spec, moved, sizes, target):
            continue
        known.add(effective)
        found.append((_cycles(spec, moved, sizes, target, threads), len(found), moved))
    found.sort(key=lambda each: each[:2])
    best = min((_cycles(spec, default, sizes, target, threads), *(cost for cost, _, _ in found)))
    return (default, *(moved for cost, _, moved in found[: limit - 1] if cost <= slowest * best))


def _moves(spec: KernelSpec, sizes: Sizes, target: Target, default: Tuning) -> Iterator[Tuning]:
    """The default with one axis moved, then with two."""
    e, few = spec.experts, default.few
    narrow = [
        tuple(v if layout == "nk" else 4 * v for layout in (e.layout_in, e.layout_out)) for v in (16, 32, 64, 128)
    ]
    axes = {
        "few": [(0, 0), (few[0] // 2, few[1] // 2), (2 * few[0], 2 * few[1]), (8 * few[0], 8 * few[1])],
        "few_cols": narrow,
        "many_cols": [(n, n) for n in (32, 64, 128, 256)],
        "row_block": [48, 96, 192, 384, 512],
        "k_few": [256, 512, 1024, 2048, 4096],
        "k_many": [(n, n) for n in (64, 128, 192, 256, 384, 512, 1024)],
    }
    for name, values in axes.items():
        yield from (replace(default, **{name: value}) for value in values)
    for (one, some), (two, others) in itertools.combinations(axes.items(), 2):
        yield from (replace(default, **{one: a, two: b}) for a in some for b in others)


def _effective(t: Tuning, sizes: Sizes) -> tuple[object, ...]:
    """What is left of a tuning at these sizes: numbers that no expert can reach, or that cut nothing, do not count."""
    most, depth = sizes.T, max(sizes.H, sizes.F)
    streams, packs = min(t.row_block, most) > 0, tuple(most > f for f in t.few)
    widths = (sizes.F, sizes.O)
    return (
        tuple(min(f, most) for f in t.few),
        tuple(min(c, w) if streams and f > 0 else 0 for c, w, f in zip(t.few_cols, widths, t.few, strict=True)),
        tuple(min(c, w) if p else 0 for c, w, p in zip(t.many_cols, widths, packs, strict=True)),
        min(t.row_block, most),
        min(t.k_few, depth) if any(t.few) else 0,
        tuple(min(n, depth) if p else 0 for n, p in zip(t.k_many, packs, strict=True)),
    )


def _fits(spec: KernelSpec, t: Tuning, sizes: Sizes, target: Target) -> bool:
    """Whether what is read again and again stays in cache: a packed panel in a corner of L2, a packed block in L2.

    Rows may overflow L2: they are read once a panel, at a fraction of what the next cache gives.
    """
    panel = target.lanes * target.tile_vectors
    layouts = (spec.experts.layout_in, spec.experts.layout_out)
    wide = (2 if spec.experts.gate == "interleaved" else 1, 1)
    widest = max(sizes.H, sizes.F, sizes.O)
    for phase, layout in enumerate(layouts):
        if t.few[phase] >= sizes.T:
            continue
        depth = min(t.k_many[phase], max(sizes.H, sizes.F))
        block = depth * (panel if layout == "nk" else min(t.many_cols[phase] * wide[phase], widest))
        if 4 * panel * depth > target.l2_bytes // 8 or 4 * block > target.l2_bytes // 2:
            return False
        if 4 * min(t.row_block, sizes.T) * depth > 2 * target.l2_bytes:
            return False
    return True


def _cycles(spec: KernelSpec, t: Tuning, sizes: Sizes, target: Target, threads: int) -> float:
    """A sketch of a call's cycles on one thread of `threads`, every expert hit having the same rows.

    Bytes a cycle from memory, L2 and L1 are 6, 24 and 64, two multiply-adds of vectors a cycle: the ratios of recent
    cores, whose absolute value does not matter here.
    """
    hits = max(1, min(sizes.E, sizes.T * sizes.k))
    rows = max(1, sizes.T * sizes.k // hits)
    item = 4 if spec.experts.dtype == "f32" else 2
    total = 0.0
    shapes = (
        (sizes.H, sizes.F * spec.experts.ab_views, spec.experts.layout_in),
        (sizes.F, sizes.O, spec.experts.layout_out),
    )
    for phase, (depth, width, layout) in enumerate(shapes[: 1 + spec.experts.out]):
        m = min(rows, t.row_block)
        blocks = -(-rows // t.row_block)
        streamed = m <= t.few[phase]
        cols = t.few_cols[phase] if streamed else t.many_cols[phase]
        work = rows * depth * width / (2 * target.lanes)
        if streamed:
            kept = 24.0 if m * min(depth, t.k_few) * 4 > target.l1_bytes // 2 else 64.0
            again = rows * depth * 4 * (width / 4) / kept if layout == "nk" else rows * depth / 64 * width * 8 / 24
        else:
            kb = min(depth, t.k_many[phase])
            panel = target.lanes * target.tile_vectors
            sums = rows * width * 8 * (depth / kb) / 24
            pack = blocks * depth * width * (1.0 if layout == "nk" else 0.5)
            again = rows * depth * 4 * (width / panel) / 64 + sums + pack
        read = blocks * depth * width * item / (6.0 / threads)
        tasks = hits * blocks * -(-width // cols)
        idle = (-(-tasks // threads) * threads) / tasks
        total += hits * max(work + again / 2, read) / threads * idle + tasks / threads * 300
    return total
