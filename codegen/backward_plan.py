"""The plan of a backward call: tiles, groups of experts, the layout of the workspace, and what forward should save.

Pure: no torch, no hardware, no I/O.
Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from moec.codegen.plan import BYTES, LINE, Rows, padded_ld, up
from moec.codegen.tuning import TILE, Sizes, few_rows, in_tiles, pairs_of_bf16, row_block, row_bytes, tile_room
from moec.ir.bounds import TOKENS, Size, floor_div, least, most, plain_bound, tokens_to_try
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.target import Target

_GROUP_BYTES = 32 << 20  # of activations and slopes at a time: what a cache or two hold
_STREAMED = 96  # rows an expert at most: of 128 and more (Zen 4, bf16) packing takes 0.82 to 0.97 × the time
_OUTER_COLS, _OUTER_ROWS, _OUTER_PANELS = 256, 256, 4


@dataclass(frozen=True)
class BackwardPlan:
    """The numbers a backward kernel is called with, in the order and with the meaning of `BackwardArgs`."""

    threads: int
    sizes: Sizes
    group: int
    row_block: int
    few: tuple[int, int, int]
    k_many: tuple[int, int, int]
    k_few: int
    cols: int
    x_cols: int
    outer: tuple[int, int, int]
    x_direct: bool
    g_direct: bool
    ld: tuple[int, int, int, int]
    places: tuple[int, ...]
    thread_places: tuple[int, ...]
    workspace_bytes: int

    @property
    def words(self) -> tuple[int, ...]:
        """The plan as the leading fields of `BackwardArgs`."""
        s = self.sizes
        return (
            *(self.threads, s.T, s.H, s.F, s.O, s.E, s.k, self.group, *self.few, *self.k_many),
            *(self.k_few, self.row_block, self.cols, self.x_cols, *self.outer),
            *(int(self.x_direct), int(self.g_direct), *self.ld, *self.places, *self.thread_places),
        )


def views(spec: ExpertsSpec) -> int:
    """Slopes of a row by F: those of a and, where there is one, b."""
    return spec.ab_views


def group_pairs(spec: KernelSpec, H: int, F: int, target: Target) -> int:
    """Pairs of (token, slot) that are taken together, unless one expert has more."""
    numbers = (views(spec.experts) + spec.experts.out) * F
    return max(_GROUP_BYTES // (row_bytes(spec.experts, target) * numbers + 4 * H), 1)


def saves_activations(spec: KernelSpec, H: int, F: int, O: int, k: int) -> bool:
    """Whether forward keeps the projections a and b of each pair for backward, by bytes a token.

    They replace 2 or 1 of the 8 or 6 products of a training step, so they are kept wherever the layer stays under 60 %
    of what autograd keeps of the same layer in plain torch: x[H] and the results of each step (projections, φ's parts,
    h, the down projection) of each pair. Independent of T, which may be unknown.
    """
    v, item = views(spec.experts), BYTES[spec.experts.dtype]
    kept = k * v * F * item
    working = (H + O) * 4  # copies of x and of y's gradient as floats; sums of x's gradient are autograd's too
    eager = k * (H + (O if spec.experts.out else 0) + 2 * v * F) * item
    return kept + working <= 0.6 * eager


@lru_cache(maxsize=4096)
def make_backward_plan(
    spec: KernelSpec, sizes: Sizes, x: Rows, g: Rows, most_rows: int, target: Target, threads: int
) -> BackwardPlan:
    """The plan of a call with x and y's gradient as they lie; `most_rows` bounds the pairs of one expert."""
    e = spec.experts
    back = {"nk": "kn", "kn": "nk"}
    layouts = (e.layout_in, back[e.layout_out], back[e.layout_in])
    item = row_bytes(spec.experts, target)
    few = [min(few_rows(layout, e, target), _STREAMED) for layout in layouts]
    k_many = [_many_depth(e, layout, target) for layout in layouts]
    cols, x_cols = (64 if layout == "nk" else 128 for layout in layouts[1:])
    rows = 2 * TILE if in_tiles(e, target) else target.tile_rows
    outer = (132 // rows * rows, _OUTER_COLS, _OUTER_ROWS)
    direct = (_in_place(spec, sizes, x, item), _in_place(spec, sizes, g, item, gradient=True))
    (x_direct, g_direct), ld = direct, _row_lengths(spec, sizes, item)
    sections = _sections(spec, sizes, sizes.T, direct, x.dtype, cols, most_rows, target)
    places: list[int] = []
    end = 0
    for size in sections:
        places.append(end)
        end += up(size, LINE)
    end = up(end, 4096)
    thread = _thread_places(spec, sizes, target, cols, x_cols, max(k_many), outer)
    return BackwardPlan(
        threads=threads, sizes=sizes, group=group_pairs(spec, sizes.H, sizes.F, target),
        row_block=row_block(e, target), few=(few[0], few[1], few[2]),
        k_many=(k_many[0], k_many[1], k_many[2]), k_few=1024, cols=cols, x_cols=x_cols, outer=outer,
        x_direct=x_direct, g_direct=g_direct, ld=ld, places=(*places, end), thread_places=thread,
        workspace_bytes=end + threads * thread[0],
    )  # fmt: skip


def _many_depth(e: ExpertsSpec, layout: str, target: Target) -> int:
    """K of a packed block: of pairs, which take half the room and time, twice and four times as much."""
    if pairs_of_bf16(e, target) and not in_tiles(e, target):
        return 512
    return 256 if layout == "nk" else 128


def _row_lengths(spec: KernelSpec, sizes: Sizes, item: int) -> tuple[int, int, int, int]:
    """Of a row of x, of y's gradient, of h and of slopes, whose numbers have `item` bytes."""
    widths = (sizes.H, sizes.O, sizes.F, views(spec.experts) * sizes.F)
    x, g, h, slopes = (padded_ld(width, item) for width in widths)
    return x, g, h, slopes


def _sections(
    spec: KernelSpec,
    sizes: Sizes,
    tokens: Size,
    direct: tuple[bool, bool],
    x_dtype: str,
    cols: int,
    most_rows: Size,
    target: Target,
) -> tuple[Size, ...]:
    """Bytes of each part of the workspace for `tokens`, a number or a symbol; `most_rows` bounds one expert's pairs."""
    item = row_bytes(spec.experts, target)
    ld, n = _row_lengths(spec, sizes, item), tokens * sizes.k
    rows = least(n, most(group_pairs(spec, sizes.H, sizes.F, target), most_rows))
    x_rows = 0 if direct[0] else tokens if spec.experts.weight_on == "output" else rows
    hits = least(sizes.E, n)
    return (
        x_rows * ld[0] * item,
        0 if direct[1] else tokens * ld[1] * item,
        tokens * sizes.H * 4 if x_dtype != "f32" else 0,
        *(n * 4, n * -(-sizes.F // cols) * 4, n * 8, n * 8, (sizes.E + 1) * 8),
        *(hits * 32, (hits + floor_div(n, row_block(spec.experts, target)) + 1) * 40, (hits + 1) * 64),
        *(n * 8, n * 8, n * 8, n * 8),
        *(rows * ld[2] * item if spec.experts.out else 0, rows * ld[3] * item, rows * sizes.H * 4),
    )


def backward_formula(
    spec: KernelSpec, sizes: Sizes, x: Rows, g: Rows, most_rows: Size, target: Target, threads: int
) -> Size:
    """A bound on `make_backward_plan(…).workspace_bytes` in T, for every T up to `sizes.T`."""
    tries = [replace(sizes, T=tokens) for tokens in tokens_to_try(sizes.T)]
    item = row_bytes(spec.experts, target)
    direct = (
        all(_in_place(spec, at, x, item) for at in tries),
        all(_in_place(spec, at, g, item, gradient=True) for at in tries),
    )
    plan = make_backward_plan(spec, sizes, x, g, sizes.T, target, threads)
    parts = _sections(spec, sizes, TOKENS, direct, x.dtype, plan.cols, most_rows, target)
    fixed = len(parts) * (LINE - 1) + 4096 + threads * plan.thread_places[0]
    return plain_bound(sum(parts)) + fixed


def saved_bytes(spec: KernelSpec, H: int, F: int, O: int, k: int, save: str) -> int:
    """Bytes a token of the projections that forward keeps for backward; `save` is the option's value."""
    keep = save == "always" or (save == "auto" and saves_activations(spec, H, F, O, k))
    return k * views(spec.experts) * F * BYTES[spec.experts.dtype] if keep else 0


def _in_place(spec: KernelSpec, sizes: Sizes, rows: Rows, item: int, gradient: bool = False) -> bool:
    """Whether rows can be read where they are: numbers that nothing rounds, and not apart by what evicts each other."""
    if not gradient and spec.experts.weight_on == "input":
        return False
    if item == 2:
        fits = rows.dtype == "bf16" and (sizes.O if gradient else sizes.H) % 2 == 0
    else:
        fits = rows.dtype == "f32" and (gradient or spec.experts.dtype == "f32")
    return fits and rows.contiguous and (sizes.T < 16 or rows.stride * item % 1024 != 0)


def _thread_places(
    spec: KernelSpec, sizes: Sizes, target: Target, cols: int, x_cols: int, k_many: int, outer: tuple[int, int, int]
) -> tuple[int, int, int, int, int]:
    """(bytes, at_tile, at_b, at_c, at_rows) of a thread: products and blocks of gradients take turns in it."""
    panel, lanes = target.lanes * target.tile_vectors, target.lanes
    m, n, k = outer
    packed = (up(2 * max(cols, x_cols), panel) + panel) * (k_many + 2) * 4
    rows = row_block(spec.experts, target)
    packed += tile_room(rows, k_many) if in_tiles(spec.experts, target) else 0
    at_tile = up(max(packed, sizes.H * 4), 4096)
    tile = rows * max(up(cols, lanes) * (1 + views(spec.experts)), up(x_cols, lanes)) * 4
    at_b = up(m * (k + lanes) * 4, 4096)
    at_c = at_b + up((k + 1) * _OUTER_PANELS * panel * 4, 4096)
    blocks = at_c + (0 if spec.experts.dtype == "f32" else m * n * 4)
    at_rows = up(max(at_tile + tile, blocks), 4096)
    return at_rows + up(max(m, rows) * 8, 4096), at_tile, at_b, at_c, at_rows
