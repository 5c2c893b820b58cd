"""The launches that say who goes where: the router, its choice, and pairs in the order of their experts.

A router's products are split over blocks by tokens, experts and slices of a row; the next launch adds the slices,
chooses, and orders pairs. Where routing is the model's own, pairs are only ordered.
Letters: T tokens, H hidden, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from moec.codegen.triton_call import (
    Argument,
    At,
    Buffer,
    Launch,
    ceil_div,
    constants,
    lanes,
    pointer,
    power_of_two,
    tile_pointers,
)
from moec.ir.bounds import Size, most

_RECOUNTED = 4096  # pairs up to which each block of `dispatch` counts all of them; of more, a launch of its own counts
_GROUPS, _GROUP = 32, 1024  # of pairs that are counted apart: at most so many, of at least so many pairs
_CHOICES = 512  # blocks that choose experts, at most
_PLACED = 16  # pairs that a block places
_PROGRAMS = 256  # blocks that share a router's products, at most, where rows are split
_SLICES, _SPLIT_ROWS = 16, 4096  # slices, and tokens · slices, at most: they are written and read again
_WARPS = 2  # of `route`: one chooses as fast, but on sm_90 it spills in some sizes; of four each step waits for all
_HALVED = 4096  # tokens up to which rows are halved in any case


def routing_buffers(at: At) -> tuple[Buffer, ...]:
    """What the launches of this file share beside what they hand on; T may be a symbol, then it is a bound."""
    s, tokens = at.sizes, cast("Size", at.sizes.T)
    if not isinstance(tokens, int):
        parts = (Buffer("parts", "f32", (most(tokens, _SPLIT_ROWS, 2 * _HALVED), s.E)),) if at.routed else ()
        return (*parts, Buffer("counts", "i32", (1 + _GROUPS, s.E)))
    if at.routed:
        return Buffer("parts", "f32", (_router_tile(at).slices, s.T, s.E)), _counts(at, _token_groups(at)[1])
    return (_counts(at, _pair_groups(at)[1]),) if at.pairs > _RECOUNTED else ()


def _counts(at: At, groups: int) -> Buffer:
    """Of each expert: the pairs of all groups, and of each where there are several."""
    return Buffer("counts", "i32", (1 + power_of_two(groups) if groups > 1 else 1, at.sizes.E))


def routing(at: At) -> tuple[Launch, ...]:
    """The launches up to the first product."""
    if at.routed:
        return _router(at), _route(at)
    return dispatch(at)


def dispatch(at: At) -> tuple[Launch, ...]:
    """Pairs whose experts are given, in the order of experts."""
    if at.pairs > _RECOUNTED:
        return _count(at), _dispatch_counted(at)
    s = at.sizes
    block = max(32, power_of_two(at.pairs))
    consts = constants(E=s.E, BLOCK_E=power_of_two(s.E + 1), BLOCK_PAIRS=block, BLOCK_M=at.config.block_m)
    arguments = (pointer("experts", "i64"), *tile_pointers(at), Argument("pairs", "i32", at.pairs), *consts)
    return (Launch("dispatch", (s.E,), arguments, 8 if block > 1024 else 4, 1),)


def _pair_groups(at: At) -> tuple[int, int]:
    """Pairs of a group, and how many groups there are."""
    each = max(_GROUP, power_of_two(ceil_div(at.pairs, _GROUPS)))
    return each, ceil_div(at.pairs, each)


def _token_groups(at: At) -> tuple[int, int]:
    """Tokens of a group, and how many groups there are."""
    s = at.sizes
    each = max(_PLACED, power_of_two(ceil_div(_GROUP, s.k)), power_of_two(ceil_div(s.T, _GROUPS)))
    return each, ceil_div(s.T, each)


def _count(at: At) -> Launch:
    each, groups = _pair_groups(at)
    consts = constants(E=at.sizes.E, BLOCK_E=power_of_two(at.sizes.E + 1), GROUP=each, BLOCK_PAIRS=min(each, 1024))
    arguments = (pointer("experts", "i64"), pointer("counts", "i32"), Argument("pairs", "i32", at.pairs), *consts)
    return Launch("count_pairs", (groups,), arguments, 4, 1)


def _dispatch_counted(at: At) -> Launch:
    each, groups = _pair_groups(at)
    consts = constants(
        E=at.sizes.E, GROUP=each, BLOCK_GROUPS=power_of_two(groups), BLOCK_E=max(16, power_of_two(at.sizes.E)),
        **_placing(at),
    )  # fmt: skip
    counts = pointer("counts", "i32")
    arguments = (pointer("experts", "i64"), counts, *tile_pointers(at), Argument("pairs", "i32", at.pairs), *consts)
    return Launch("dispatch_counted", (ceil_div(at.pairs, _PLACED),), arguments, 4, 1)


def _placing(at: At) -> dict[str, int | bool]:
    """What placing pairs is specialised by."""
    return {"UNIT": _PLACED, "BLOCK_PAIRS": min(128, max(16, power_of_two(at.pairs))), "BLOCK_M": at.config.block_m}


def router_operands(at: At) -> tuple[Argument, ...]:
    """The tokens, and the router's matrix."""
    o = at.operands
    return pointer("x", o.x_dtype), pointer("router", o.router_dtype)


def router_bias(at: At) -> tuple[Argument, ...]:
    """The router's bias, if it has one."""
    assert at.spec.router is not None
    return (pointer("router_bias", at.operands.router_bias_dtype),) if at.spec.router.bias else ()


def choice(at: At) -> tuple[Argument, ...]:
    """The arguments that choosing experts takes, after the logits."""
    o, r = at.operands, at.spec.router
    assert r is not None
    return (
        *((pointer("selection", o.selection_dtype),) if r.selection_bias else ()),
        pointer("logits", r.compute),
        pointer("weights", r.weight_dtype),
        pointer("experts", "i64"),
    )


def router_consts(at: At) -> dict[str, int | bool]:
    """Sizes and strides of the router's product."""
    o = at.operands
    return {
        "H": at.sizes.H, "E": at.sizes.E, "stride_x_t": o.x_strides[0], "stride_x_h": o.x_strides[1],
        "stride_router_e": o.router_strides[0], "stride_router_h": o.router_strides[1],
    }  # fmt: skip


def choice_consts(at: At) -> dict[str, int | bool]:
    """What choosing is specialised by."""
    s, r = at.sizes, at.spec.router
    assert r is not None
    return {
        "K": s.k, "BLOCK_E": max(16, power_of_two(s.E)), "BLOCK_SLOTS": max(16, power_of_two(s.k)),
        "WIDE_CHOICE": r.selection_bias and at.operands.selection_dtype == "f32",
    }  # fmt: skip


def _half(at: At) -> bool:
    return at.operands.x_dtype == at.operands.router_dtype != "f32"


@dataclass(frozen=True)
class _Tile:
    """What a block of the router's product sums: tokens × experts, in steps of a row, `depth` of it in `slices`."""

    tokens: int
    experts: int
    step: int
    stages: int
    warps: int
    depth: int
    slices: int


def _router_tile(at: At) -> _Tile:
    """At most as large as the products' own tile, whose operands fit, or within the 64 KiB that every GPU has.

    Steps of 32 are for sums without matrix instructions (sm_75), whose operands take registers as fp32 ones do.
    """
    s, c = at.sizes, at.config
    columns, rows = max(16, power_of_two(s.E)), power_of_two(s.H)
    if not _half(at) or c.block_k <= 32:
        tile = 16, min(columns, 64), 32, 2, 4
    elif s.T <= 32:
        tile = 16, min(columns, 64), 128, 3, 4
    elif s.T >= 2048 and columns >= 128 and min(c.block_m, c.block_n) >= 128:
        fitting = c.num_stages * (c.block_m + c.block_n) * c.block_k // (256 * 64)  # as much memory as they take
        tile = 128, 128, 64, min(4, fitting) if c.num_stages > 2 else c.num_stages, 8
    elif columns < 64:
        tile = 64, columns, 128, 3, 4
    else:
        tile = 64, 64, 64, 4, 4
    tokens, experts, step, stages, warps = tile
    step = min(step, max(16, rows))
    blocks = ceil_div(s.T, tokens) * ceil_div(s.E, experts)
    slices = max(1, min(_SLICES, _PROGRAMS // blocks, max(2 if s.T <= _HALVED else 1, _SPLIT_ROWS // s.T)))
    slices = 1 << (slices.bit_length() - 1)  # no other number for each T: kernels are compiled for it
    depth = step * ceil_div(ceil_div(s.H, step), slices)
    warps = 2 if tokens * experts <= 512 else warps  # 4 warps spill on the least tile
    return _Tile(tokens, experts, step, stages, warps, depth, ceil_div(s.H, depth))


def _router(at: At) -> Launch:
    s, tile = at.sizes, _router_tile(at)
    groups = _token_groups(at)[1]
    consts = constants(
        **router_consts(at), BLOCK_T=tile.tokens, BLOCK_E=tile.experts, BLOCK_H=tile.step, DEPTH=tile.depth,
        EVEN_H=s.H % tile.depth == 0, WIDE_X=at.wide_x, HALF=_half(at), COUNTS=math.prod(_counts(at, groups).shape),
        WIDE_ROUTER=at.wide_router,
    )  # fmt: skip
    written = pointer("parts", "f32"), pointer("counts", "i32"), pointer("counters", "i32")
    arguments = (*router_operands(at), *written, Argument("T", "i32", s.T), *consts)
    grid = (ceil_div(s.T, tile.tokens), ceil_div(s.E, tile.experts), tile.slices)
    return Launch("router", grid, arguments, tile.warps, tile.stages)


def _route(at: At) -> Launch:
    s = at.sizes
    each, groups = power_of_two(ceil_div(s.T, _CHOICES)), _token_groups(at)
    numbers = choice_consts(at)
    own: dict[str, int | bool] = {
        "SLICES": _router_tile(at).slices, "UNIT_T": each,
        "BLOCK_T": min(each, max(1, 512 // int(numbers["BLOCK_E"]))), "GROUP_T": groups[0],
        "BLOCK_GROUPS": power_of_two(groups[1]),
    }  # fmt: skip
    arguments = (
        pointer("parts", "f32"), *router_bias(at), *choice(at), pointer("counts", "i32"), *tile_pointers(at),
        Argument("T", "i32", s.T), *constants(E=s.E, **numbers, **own, **_placing(at), LANES=lanes(_WARPS)),
    )  # fmt: skip
    return Launch("route", (ceil_div(s.T, each) + ceil_div(at.pairs, _PLACED),), arguments, _WARPS, 1)
