"""The plan of a call: tile sizes, crossovers and the layout of the workspace. Pure: no torch, no hardware, no I/O.

Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from moec.codegen.storage import Storage
from moec.codegen.tuning import Sizes, Tuning, default_tuning, in_tiles, pairs_of_bf16, tile_room
from moec.ir.bounds import TOKENS, Size, floor_div, least, plain_bound, tokens_to_try
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.target import Target

BYTES = {"f32": 4, "bf16": 2, "f16": 2}
LINE = 64


@dataclass(frozen=True)
class Rows:
    """How x lies in memory: its element type, the elements from row to row, and whether a row is contiguous."""

    dtype: str
    stride: int
    contiguous: bool


@dataclass(frozen=True)
class Plan:
    """The numbers a kernel is called with, in the order and with the meaning of `Args` in args.hpp."""

    threads: int
    sizes: Sizes
    tuning: Tuning
    x_direct: bool
    router_direct: bool
    ld_x: int
    ld_h: int
    places: tuple[int, ...]
    per_thread: int
    at_tile: int
    workspace_bytes: int

    @property
    def words(self) -> tuple[int, ...]:
        """The plan as the leading fields of `Args`."""
        s, t = self.sizes, self.tuning
        return (
            *(self.threads, s.T, s.H, s.F, s.O, s.E, s.k, t.chunk, *t.few),
            *(*t.few_cols, *t.many_cols, t.row_block, t.k_few, *t.k_many),
            *(int(self.x_direct), int(self.router_direct), self.ld_x, self.ld_h),
            *(*self.places, self.per_thread, self.at_tile),
        )


def up(n: int, to: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // to) * to


def padded_ld(n: int, itemsize: int) -> int:
    """A row length that is whole cache lines and never a multiple of 4 KiB, so that rows do not evict each other."""
    return up(n, LINE // itemsize) + LINE // itemsize


@lru_cache(maxsize=4096)
def make_plan(
    spec: KernelSpec,
    sizes: Sizes,
    x: Rows,
    target: Target,
    threads: int,
    tuning: Tuning | None = None,
    storage: Storage | None = None,
) -> Plan:
    """The plan of a call with x as `x` lies, on `threads` threads of `target`; without `tuning`, with the default's.

    With `storage` the kernel reads its own copy of the weights, whose panels no task may cut.
    """
    t = tuning or default_tuning(spec, sizes, target, threads)
    t = _whole_panels(t, target) if storage else t
    pairs = storage.pairs if storage else pairs_of_bf16(spec.experts, target)
    item = 2 if pairs else 4
    copied = _copied(spec, sizes, x, pairs)
    ld_x, ld_h = padded_ld(sizes.H, item), padded_ld(sizes.F, item)
    sections = _sections(spec, sizes, min(sizes.T, t.chunk), t, copied, item)
    places: list[int] = []
    end = 0
    for size in sections.values():
        places.append(end)
        end += up(size, LINE)
    if copied.shared:
        places[0] = places[1]
    at_tile, per_thread = _thread_bytes(spec.experts, sizes, target, t)
    return Plan(
        threads=threads, sizes=sizes, tuning=t, x_direct=not copied.experts, router_direct=not copied.router,
        ld_x=ld_x, ld_h=ld_h,
        places=(*places, end), per_thread=per_thread, at_tile=at_tile, workspace_bytes=end + threads * per_thread,
    )  # fmt: skip


@dataclass(frozen=True)
class Copied:
    """Whether x is copied for the experts, for the router, and whether one copy serves both."""

    experts: bool
    router: bool
    shared: bool


def _copied(spec: KernelSpec, sizes: Sizes, x: Rows, pairs: bool) -> Copied:
    direct = _read_in_place(spec, sizes, x, pairs)
    router = x.dtype == "f32" and x.contiguous and spec.router is not None and spec.router.compute == "f32"
    shared = not direct and not pairs and spec.experts.weight_on == "output" and _exact(x.dtype, spec)
    return Copied(not direct, not router, shared)


def _sections(spec: KernelSpec, sizes: Sizes, tokens: Size, t: Tuning, copied: Copied, item: int) -> dict[str, Size]:
    """Bytes of each part of the workspace for `tokens` at a time, a number or a symbol."""
    router = spec.router is not None
    ld_x, ld_h, n = padded_ld(sizes.H, item), padded_ld(sizes.F, item), tokens * sizes.k
    x_rows = 0 if not copied.experts else tokens if spec.experts.weight_on == "output" else n
    segments = least(sizes.E, n) + floor_div(n, t.row_block) + 1
    return {
        "router_x": 0 if not router or not copied.router or copied.shared else tokens * ld_x * 4,
        "x": x_rows * ld_x * item,
        "logits": tokens * sizes.E * 4 if router else 0,
        "weights": n * 4,
        "position": n * 8,
        "pair": n * 8,
        "begin": (sizes.E + 1) * 8,
        "segments": segments * 40,
        "x_rows": n * 8,
        "h_rows": n * 8,
        "router_rows": tokens * 8,
        "h": n * ld_h * item if spec.experts.out else 0,
        "out": n * sizes.O * 4,
    }


def workspace_formula(
    spec: KernelSpec, sizes: Sizes, x: Rows, target: Target, threads: int, storage: Storage | None = None
) -> Size:
    """A bound on `make_plan(…).workspace_bytes` in T, for every T up to `sizes.T`, with the default's tuning.

    The largest of what is decided for some T in that range: copies of x from 16 tokens on, wider tasks for more hits.
    """
    pairs = storage.pairs if storage else pairs_of_bf16(spec.experts, target)
    totals: list[Size] = []
    for tokens in tokens_to_try(sizes.T):
        at = replace(sizes, T=tokens)
        t = default_tuning(spec, at, target, threads)
        t = _whole_panels(t, target) if storage else t
        parts = _sections(spec, at, TOKENS, t, _copied(spec, at, x, pairs), 2 if pairs else 4)
        whole = plain_bound(sum(parts.values())) + len(parts) * (LINE - 1)
        each = _thread_bytes(spec.experts, at, target, t)[1]
        totals.append((whole.coeff(TOKENS), whole.subs(TOKENS, 0) + threads * each, t.chunk))
    slope, fixed, chunk = (max(column) for column in zip(*totals, strict=True))
    return slope * least(TOKENS, chunk) + fixed


def _whole_panels(t: Tuning, target: Target) -> Tuning:
    """The tuning with tasks as wide as whole panels."""
    panel = target.lanes * target.tile_vectors
    few, many = ((up(pair[0], panel), up(pair[1], panel)) for pair in (t.few_cols, t.many_cols))
    return replace(t, few_cols=few, many_cols=many)


def _read_in_place(spec: KernelSpec, sizes: Sizes, x: Rows, pairs: bool) -> bool:
    if spec.experts.weight_on == "input" or not x.contiguous or x.dtype != spec.experts.dtype:
        return False
    if pairs:
        return sizes.H % 2 == 0 and sizes.T < 16
    # With more tokens a padded copy is cheap and keeps rows that are 4 KiB apart from evicting each other.
    return x.dtype == "f32" and (sizes.T < 16 or x.stride * 4 % 1024 != 0)


def _exact(dtype: str, spec: KernelSpec) -> bool:
    """Whether x as floats is the same for the router and the experts: neither rounds it."""
    wanted = (spec.experts.dtype, spec.router.compute if spec.router else "f32")
    return all(w in (dtype, "f32") for w in wanted)


def _thread_bytes(e: ExpertsSpec, sizes: Sizes, target: Target, t: Tuning) -> tuple[int, int]:
    """Where a thread's tile of C begins, after its packed block or the router's scratch; and the whole share."""
    panel = target.lanes * target.tile_vectors
    packed = (up(2 * max(t.many_cols), panel) + panel) * (max(t.k_many) + 2) * 4
    if e.codes:  # room for what they stand for: rows that are packed or streamed, or a row of scales
        packed += 4 * (panel * (max(t.k_few, *t.k_many) + panel) + 2 * max(t.many_cols))
    if in_tiles(e, target):
        packed += tile_room(t.row_block, max(t.k_many))
    packed = max(packed, 16 * (t.k_few + target.lanes))  # rows of W that are widened once for many rows of x
    scratch = up(sizes.E * 4, LINE) + sizes.E * 16
    at_tile = up(max(packed, scratch), 4096)
    tile = max(t.row_block * t.many_cols[0], min(t.row_block, max(t.few)) * t.few_cols[0])
    return at_tile, at_tile + up(2 * 4 * tile, 4096)
