"""What whole numbers and masks can be at least and at most, and what follows from it.

%i = topk(%x: [T, E])[1]                 0 ≤ i ≤ E − 1
%m = ge(%i, E); masked_fill(%y, %m, 0)   →   %y
clamp_max(%i, E − 1)                     →   %i
skip(%e, eq(%e, E))                      →   %e

Only what a range decides goes. What none decides, a choice that is an input, say, stays as it was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moec.ir.dims import Dim
from moec.ir.graph import Arg, Graph, Instr, Ref

Range = tuple[float, float]
"""The least and the largest value that an element may have; a mask's are among 0 and 1."""

ANYTHING: Range = (-math.inf, math.inf)
LIMITS: Mapping[str, Range] = {
    "bool": (0, 1),
    "u8": (0, 2**8 - 1),
    "i8": (-(2**7), 2**7 - 1),
    "i16": (-(2**15), 2**15 - 1),
    "i32": (-(2**31), 2**31 - 1),
}
"""What a dtype can hold: beyond, numbers begin anew."""
EXACT: Range = (-256, 256)
"""Whole numbers that are the same in every dtype of floats."""
DEPTH = 40
"""How far back a range is looked for."""


@dataclass
class Ranges:
    """The ranges of a graph's values, each worked out once, and only where something asks."""

    graph: Graph
    memo: dict[str, Range] = field(default_factory=dict)
    depth: int = 0

    def of(self, arg: Arg) -> Range:
        """The range of a value or a literal."""
        if isinstance(arg, int) or (isinstance(arg, float) and abs(arg) <= EXACT[1]):
            return (arg, arg)
        if not isinstance(arg, Ref):
            return ANYTHING
        made = self.graph.defs.get(arg.name)
        if made is None or self.depth > DEPTH:
            return ANYTHING
        if arg.name not in self.memo:
            self.depth += 1
            self.memo[arg.name] = self._made(made, made.results.index(arg.name))
            self.depth -= 1
        return self.memo[arg.name]

    def _made(self, made: Instr, which: int) -> Range:
        rule = RULES.get(made.word)
        if rule is None:
            return ANYTHING
        low, high = rule(self, made, which)
        dtype = made.types[which].dtype
        least, most = ANYTHING if dtype == "i64" else LIMITS.get(dtype, EXACT)
        whole = all(math.isinf(bound) or float(bound).is_integer() for bound in (low, high))
        return (low, high) if whole and least <= low and high <= most else ANYTHING

    def decided(self, mask: Arg) -> bool | None:
        """What a mask is everywhere, where its range says so."""
        low, high = self.of(mask)
        return bool(low) if low == high and low in (0, 1) else None

    def size(self, arg: Arg, axis: int) -> Dim | None:
        """The length of an axis of a value."""
        shape = self.graph.types[arg.name].shape if isinstance(arg, Ref) else ()
        return shape[axis] if -len(shape) <= axis < len(shape) else None


Rule = Callable[[Ranges, Instr, int], Range]


def _below(*sizes: Dim | None) -> Range:
    """Places along axes of these lengths."""
    known = [int(size) - 1 for size in sizes if size is not None and size.is_Integer]
    return (0, max(known) if sizes and len(known) == len(sizes) else math.inf)


def _union(*ranges: Range) -> Range:
    return (min(r[0] for r in ranges), max(r[1] for r in ranges))


def _first(ranges: Ranges, made: Instr, _which: int) -> Range:
    """Some of the elements of the first operand."""
    return ranges.of(made.args[0])


def _cast(ranges: Ranges, made: Instr, _which: int) -> Range:
    """The same number, or whether it is another one than 0."""
    low, high = ranges.of(made.args[0])
    if made.types[0].dtype != "bool":
        return (low, high)
    return (int(low > 0 or high < 0), int(not low == high == 0))


def _chosen(ranges: Ranges, made: Instr, which: int) -> Range:
    """topk, max, sort: some of the elements, and their places along an axis."""
    axis = made.attr("dim")
    if which == 0 or not isinstance(axis, int):
        return ranges.of(made.args[0]) if which == 0 else ANYTHING
    return _below(ranges.size(made.args[0], axis))


def _places(ranges: Ranges, made: Instr, which: int) -> Range:
    """where(mask): places along the axis of that number."""
    return _below(ranges.size(made.args[0], which))


def _nonzero(ranges: Ranges, made: Instr, _which: int) -> Range:
    """nonzero(x)[n, rank]: places along any of the axes."""
    return _below(*(ranges.graph.types[made.uses[0]].shape if made.uses else ()))


def _counter(_ranges: Ranges, made: Instr, _which: int) -> Range:
    """The item of a loop over range(start, end, step)."""
    start, end, step, *_ = made.args
    if not isinstance(start, int) or not isinstance(step, int) or step <= 0:
        return ANYTHING
    return (start, end - 1 if isinstance(end, int) else math.inf)


def _full(_ranges: Ranges, made: Instr, _which: int) -> Range:
    value = made.attr("value")
    return (value, value) if isinstance(value, bool | int | float) else ANYTHING


def _where(ranges: Ranges, made: Instr, _which: int) -> Range:
    """where(c, a, b), masked_fill(b, c, a): one of the two, or any."""
    cond, yes, no = made.args if made.word == "where" else (made.args[1], made.args[2], made.args[0])
    decided = ranges.decided(cond)
    if decided is None:
        return _union(ranges.of(yes), ranges.of(no))
    return ranges.of(yes if decided else no)


def _compare(ranges: Ranges, made: Instr, _which: int) -> Range:
    (low, high), (least, most) = map(ranges.of, made.args)
    apart, same = high < least or most < low, low == high == least == most and math.isfinite(low)
    always, never = {
        "lt": (high < least, low >= most),
        "le": (high <= least, low > most),
        "gt": (low > most, high <= least),
        "ge": (low >= most, high < least),
        "eq": (same, apart),
        "ne": (apart, same),
    }[made.word]
    return (int(always), int(not never))


def _mask(ranges: Ranges, made: Instr, which: int) -> Range:
    """and, or, not of masks."""
    if made.types[which].dtype != "bool":
        return ANYTHING
    found = [ranges.of(arg) for arg in made.args]
    if any(low < 0 or high > 1 for low, high in found):
        return (0, 1)
    if "and" in made.word:
        return (min(low for low, _ in found), min(high for _, high in found))
    if "or" in made.word:
        return (max(low for low, _ in found), max(high for _, high in found))
    return (1 - found[0][1], 1 - found[0][0])


def _clamp(ranges: Ranges, made: Instr, _which: int) -> Range:
    (low, high), (least, most) = map(ranges.of, made.args)
    if made.word == "clamp_min":
        return (max(low, least), max(high, most))
    return (min(low, least), min(high, most))


def _sum(ranges: Ranges, made: Instr, _which: int) -> Range:
    (low, high), (least, most) = map(ranges.of, made.args)
    return (low + least, high + most) if made.word == "add" else (low - most, high - least)


def _remainder(ranges: Ranges, made: Instr, _which: int) -> Range:
    by = made.args[1]
    return (0, by - 1) if isinstance(by, int) and by > 0 else ANYTHING


def _divide(ranges: Ranges, made: Instr, _which: int) -> Range:
    (low, high), by = ranges.of(made.args[0]), made.args[1]
    whole = isinstance(by, int) and by > 0 and low >= 0
    return (low // by, high // by if math.isfinite(high) else high) if whole and isinstance(by, int) else ANYTHING


def _cat(ranges: Ranges, made: Instr, _which: int) -> Range:
    parts = made.args[0]
    return _union(*[ranges.of(part) for part in parts]) if isinstance(parts, tuple) and parts else ANYTHING


def _place(ranges: Ranges, made: Instr, _which: int) -> Range:
    """argmax along an axis."""
    axis = made.attr("dim")
    return _below(ranges.size(made.args[0], axis)) if isinstance(axis, int) else ANYTHING


def _opaque(ranges: Ranges, made: Instr, _which: int) -> Range:
    """argmin along an axis."""
    rest = made.args[1:]
    axis = rest[0] if rest else None
    known = made.attr("target") == "argmin" and isinstance(axis, int) and not isinstance(axis, bool)
    return _below(ranges.size(made.args[0], axis)) if known and isinstance(axis, int) else ANYTHING


KEEPING = (
    "reshape permute expand repeat repeat_interleave slice same detach index gather take anchor skip skip_size unique"
)
"""Words whose result holds nothing but elements of their first operand."""

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(KEEPING.split(), _first),
    **dict.fromkeys(("topk", "max", "sort"), _chosen),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), _compare),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "logical_and", "logical_or", "invert"), _mask),
    **dict.fromkeys(("clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("where", "masked_fill"), _where),
    **dict.fromkeys(("remainder", "mod"), _remainder),
    **dict.fromkeys(("floor_divide", "truncate_divide"), _divide),
    "cast": _cast,
    "where_indices": _places,
    "nonzero": _nonzero,
    "anchor_range": _counter,
    "arange": lambda ranges, made, which: _below(*made.types[0].shape),
    "one_hot": lambda ranges, made, which: (0, 1),
    "counts": lambda ranges, made, which: (0, math.inf),
    "full": _full,
    "cat": _cat,
    "argmax": _place,
    "opaque": _opaque,
}


def decided(ranges: Ranges, instr: Instr) -> str | None:
    """The operand that an instruction gives back as it is, given what its masks and numbers can be."""
    if instr.word not in FOLDED:
        return None
    left = _kept(ranges, instr)
    if not isinstance(left, Ref) or ranges.graph.types[left.name] != instr.types[0]:
        return None
    return left.name


def _kept(ranges: Ranges, instr: Instr) -> Arg:
    first = instr.args[0]
    if instr.word in ("clamp_min", "clamp_max"):
        (low, high), (least, most) = map(ranges.of, instr.args)
        return first if (low >= most if instr.word == "clamp_min" else high <= least) else None
    if instr.word in ("skip", "masked_fill"):
        return first if ranges.decided(instr.args[1]) is False else None
    if instr.word == "where":
        which = ranges.decided(first)
        return None if which is None else instr.args[1 if which else 2]
    for mask, other in (instr.args, instr.args[::-1]):  # also of numbers: times a mask that is 1 everywhere
        if ranges.decided(mask) is True:
            return other
    return None


FOLDED = frozenset({"clamp_min", "clamp_max", "skip", "masked_fill", "where", "bitwise_and", "logical_and", "mul"})
