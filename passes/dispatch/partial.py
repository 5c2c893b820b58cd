"""Loops that run some of the experts: the others have no matrices, and hand on or drop what they are given.

for e ≥ n: y[rows] += w·x[rows]; for e < n: y[rows] += w·expert_e(x[rows])
    →   y = x · Σ_s [e[t, s] ≥ n]·w[t, s] + experts(x, w, where(e < n, e, −1), …)
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from moec.ir.graph import Graph, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.dispatch.combine import Combined, combined
from moec.passes.dispatch.runs import full_run
from moec.passes.dispatch.skips import only_idle_skipped
from moec.passes.rows.body import BodyMatch, split_weight
from moec.passes.rows.lift import Lifter
from moec.passes.rows.pairs import Writer
from moec.passes.rows.rows import Anchor, Part, Rows, Side, Slot, Token, strip

_SIDES = {("ge", 0): True, ("gt", 1): True, ("lt", 0): False, ("le", 1): False}
"""(comparison, what to add to the number) → whether it holds for the experts from that number on."""


def side_of(graph: Graph, word: str, item: Anchor, limit: int) -> Side | None:
    """e ≥ n, e > n − 1: the experts from n on; e < n, e ≤ n − 1: those before; e ≠ n: all but the last or first."""
    if word == "ne":
        end = end_side(graph, item, limit)
        return None if end is None else replace(end, above=not end.above)
    for (how, add), above in _SIDES.items():
        if how == word:
            return Side(item.name, limit + add, above)
    return None


def end_side(graph: Graph, item: Anchor, number: int) -> Side | None:
    """e = n where n is the last or the first number that a loop counts to: one side of its experts."""
    made = graph.defs[item.name]
    if made.word != "anchor_range":
        return None
    if made.args[1] == number + 1:
        return Side(item.name, number, True)
    return Side(item.name, 1, False) if number == 0 else None


def skip_side(lifter: Lifter, item: Anchor, side: Side) -> Anchor | None:
    """The loop's item where a skip leaves the experts of one side; None where two skips disagree."""
    part = Part(side.limit, not side.above)
    return item if lifter.partial.setdefault(item.name, part) == part else None


def part_of(lifter: Lifter, anchor: str) -> Part | None:
    """The experts that a loop runs; None where it runs all, or skips what is no expert's."""
    if anchor:
        only_idle_skipped(lifter, anchor)  # reads every skip of the loop, used or not
    return lifter.partial.get(anchor)


def some_experts(
    lifter: Lifter, root: Instr, total: Combined, body: BodyMatch, part: Part, choice: str
) -> tuple[tuple[Instr, ...], str, BodyMatch, Combined]:
    """Instructions, the choice of none but these experts, the body of those that run, and where their sum begins."""
    out = Writer(lifter.graph, root)
    kind = lifter.graph.types[choice]
    start, stop = (part.limit, int(body.num_experts)) if part.above else (0, part.limit)
    runs = out.emit("ge" if part.above else "lt", (Ref(choice), part.limit), Type("bool", kind.shape))
    own = out.emit("sub", (Ref(choice), start), kind) if start else choice
    kept = out.emit("where", (Ref(runs), Ref(own), -1), kind)
    groups = tuple(_some(out, group, start, stop) if body.spec.stacked else group[start:stop] for group in body.params)
    body = replace(body, num_experts=sympy.Integer(stop - start))
    base = _handed_on(lifter, out, total.base, total, part, choice) if total.base else ""
    return tuple(out.instrs), kept, replace(body, params=groups), replace(total, base=base)


def _some(out: Writer, group: tuple[str, ...], start: int, stop: int) -> tuple[str, ...]:
    """A stacked parameter's slices from one on and before another."""
    kind = out.type(group[0])
    if start == 0 and kind.shape[0] == stop:
        return group
    cut = Type(kind.dtype, (sympy.Integer(stop - start), *kind.shape[1:]))
    return (out.emit("narrow", (Ref(group[0]),), cut, dim=0, start=start, length=stop - start),)


def _handed_on(lifter: Lifter, out: Writer, base: str, other: Combined, part: Part, choice: str) -> str:
    """x times the weights of the experts that hand it on, where `base` is their loop; else `base` as it is."""
    made = lifter.graph.defs.get(base)
    total = combined(lifter, made) if made is not None and made.word == "index_add" else NoMatch("no sum of rows")
    if isinstance(total, NoMatch) or total.base:
        return base
    rest = _visits_rest(lifter, total.rows, part, choice)
    if rest is None:
        return base
    weight, row = split_weight(total.rows.row)
    token = strip(row) if not isinstance(row, NoMatch) else row
    if not isinstance(weight, Slot) or not isinstance(token, Token) or total.rows.choice != other.rows.choice:
        return base
    x, w, to = (lifter.graph.types[name] for name in (token.value, weight.value, base))
    chosen = lifter.graph.types[choice]
    if x.shape != to.shape or w.shape != chosen.shape or w.rank != 2:
        return base
    mask = Type("bool", chosen.shape)
    bounds = [out.emit(word, (Ref(choice), limit), mask) for word, limit in zip(("ge", "lt"), rest, strict=False)]
    handed = bounds[0] if len(bounds) == 1 else out.emit("bitwise_and", tuple(map(Ref, bounds)), mask)
    only = out.emit("where", (Ref(handed), Ref(weight.value), 0.0), w)
    one = Type(w.dtype, (w.shape[0], sympy.S.One))
    total_weight = out.emit("reduce_sum", (Ref(only),), one, dims=(1,), keepdim=True)
    wide = "f32" if w.dtype != x.dtype else x.dtype
    product = out.emit("mul", (Ref(token.value), Ref(total_weight)), Type(wide, x.shape))
    return out.cast(product, to.dtype)


def _visits_rest(lifter: Lifter, rows: Rows, part: Part, choice: str) -> tuple[int, ...] | None:
    """From which expert on a loop visits all others than a part, and before which, where it ends; None where not."""
    anchor = rows.loop
    if not anchor or rows.anchor or rows.earlier or part_of(lifter, anchor) != Part(part.limit, not part.above):
        return None
    idle = only_idle_skipped(lifter, anchor) is None and anchor not in lifter.beyond
    made = lifter.graph.defs[anchor]
    if made.word == "anchor_range":
        end = part.limit if part.above else made.args[1]
        return (0 if part.above else part.limit, end) if idle and isinstance(end, int) else None
    whole = idle and full_run(lifter, anchor, sympy.Integer(part.limit), choice) is None
    if not whole:
        return None
    return (0, part.limit) if part.above else (part.limit,)
