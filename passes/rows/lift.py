"""Lift values of a graph to row programs: the driver, and the rules for index values and views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import sympy

from moec.ir.graph import Arg, Dim, Graph, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.rows.hot import Hot, same
from moec.passes.rows.rows import (
    Body,
    Cast,
    Expert,
    Gate,
    Gates,
    Ids,
    Lifted,
    OneHot,
    Part,
    PerExpert,
    Rows,
    Slot,
    Space,
    Token,
)
from moec.passes.rows.token_axes import reshaped

Lift = Lifted | NoMatch
Rule = Callable[["Lifter", Instr, int], Lift]
First = Callable[["Lifter", Instr, int], Lift | None]

INTEGER = frozenset({"i64", "i32", "i16", "i8", "u8"})
FLOATS = frozenset({"f32", "bf16", "f16", "f64"})


@dataclass
class Lifter:
    """Lifts values on demand, each once.

    beyond    anchor → an expert id that its loop skips; harmless when no expert has it
    masks     the lifter that knows what masks of capacity routing mean
    cells     the lifter that knows the letters of axes (`moec.passes.cells.rows`)
    asked     anchor → the choices by which its loop skips experts without rows
    partial   anchor → the experts that its loop runs, where it skips those of one side
    kept      a name → the mask of choices that it stands for, of which some are dropped (`moec.passes.dispatch.kept`)
    tables    a name → the table of masks that it stands for (`moec.passes.dispatch.thresholds`)
    weighed   a name → the choice of which pairs without weight are left out (`moec.passes.dispatch.weighed`)
    firsts    a name → the choice of which each expert takes the first pairs (`moec.passes.dispatch.firsts`)
    clamped   a choice → the largest id that parameters are looked up by, where greater ones count as it
    fallback  asked about what no rule knows, with the result's place and the rule's miss
    """

    graph: Graph
    rules: Mapping[str, Rule]
    masks: Lifter | None = None
    cells: Lifter | None = None
    memo: dict[str, Lift] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)
    asked: dict[str, set[str]] = field(default_factory=dict)
    partial: dict[str, Part] = field(default_factory=dict)
    kept: dict[str, Hot] = field(default_factory=dict)
    tables: dict[str, object] = field(default_factory=dict)
    weighed: dict[str, object] = field(default_factory=dict)
    firsts: dict[str, object] = field(default_factory=dict)
    clamped: dict[str, int] = field(default_factory=dict)
    fallback: Callable[[Lifter, Instr, int, NoMatch], Lift] | None = None

    def lift(self, arg: Arg) -> Lift:
        """What `arg` is in terms of rows, or why that cannot be said."""
        if not isinstance(arg, Ref):
            return NoMatch(f"{arg!r} is a literal")
        if arg.name not in self.memo:
            instr = self.graph.defs.get(arg.name)
            if instr is None:
                self.memo[arg.name] = NoMatch(
                    f"%{arg.name} is an input, the same for every row of this operation", arg.name
                )
            elif instr.word not in self.rules:
                what = instr.attr("target") if instr.word == "opaque" else instr.word
                self.memo[arg.name] = NoMatch(f"no row meaning for `{what}`", arg.name)
            else:
                found = self.rules[instr.word](self, instr, instr.results.index(arg.name))
                self.memo[arg.name] = found.deeper() if isinstance(found, NoMatch) else found
            self._fall_back(arg.name, instr)
        return self.memo[arg.name]

    def _fall_back(self, name: str, instr: Instr | None) -> None:
        miss = self.memo[name]
        if isinstance(miss, NoMatch) and instr is not None and self.fallback is not None:
            self.memo[name] = self.fallback(self, instr, instr.results.index(name), miss)

    def lift_result(self, instr: Instr) -> Lift:
        """What the first result of an instruction is in terms of rows."""
        return self.lift(Ref(instr.results[0]))

    def type(self, arg: Arg) -> Type:
        """The type of a value; `any` for a literal."""
        return self.graph.types[arg.name] if isinstance(arg, Ref) else Type("any")

    def instr(self, arg: Arg) -> Instr | None:
        """The instruction that made a value, if any did."""
        return self.graph.defs.get(arg.name) if isinstance(arg, Ref) else None


def relayout(lifter: Lifter, source: Type, layout: str, to: Type) -> str | None:
    """The layout of a row tensor after a reshape that keeps rows apart; None when the reshape mixes them."""
    lead = 1 if layout == "flat" else 2
    rows, features = source.shape[:lead], _real(source.shape[lead:])
    count = sympy.prod(rows)
    kept = lead == 2 and to.rank >= 2 and all(same(a, b) for a, b in zip(to.shape, rows, strict=False))
    if to.rank >= 1 and not kept and same(to.shape[0], count) and _real(to.shape[1:]) == features:
        return "flat"
    split = to.rank >= 2 and same(to.shape[0] * to.shape[1], count) and _real(to.shape[2:]) == features
    return "two" if split and (lead == 1 or kept) else None


def _real(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The axes of a shape that are not 1."""
    return tuple(d for d in shape if d != 1)


def _with_units(axes: tuple[str, ...], source: Type, to: Type) -> tuple[str, ...] | None:
    """A mask's axes after axes of size 1, called "1", were added or dropped."""
    left = [(axis, size) for axis, size in zip(axes, source.shape, strict=True) if axis != "1"]
    found: list[str] = []
    for i, size in reversed(list(enumerate(to.shape))):
        named = bool(left) and (left[-1][1] == size or i + 1 == len(left))
        found.append(left.pop()[0] if named else "1")
    return None if left else tuple(reversed(found))


def _mask_axes(lifter: Lifter, mask: OneHot, source: Type, to: Type) -> tuple[str, ...] | None:
    """A mask's axes after a reshape; one of a choice that is known by `lifter.kept` only gains and loses units."""
    known = mask.choice in lifter.graph.types
    found = reshaped(lifter.graph, mask.choice, mask.axes, source, to) if known else None
    if found is None and _real(source.shape) == _real(to.shape):
        sizes = zip(mask.axes, source.shape, strict=True)
        one = tuple("1" if axis == "s" and size == 1 else axis for axis, size in sizes)  # a token's one slot is no axis
        return _with_units(mask.axes, source, to) or _with_units(one, source, to)
    return found


def rule_reshape(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A reshape that only splits or joins the row axes, or adds and drops axes of size 1."""
    source, to = lifter.type(instr.args[0]), instr.types[0]
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, NoMatch):
        return _slots_of(lifter, instr)
    if isinstance(inner, Body):
        return NoMatch("a reshape inside an expert's own code", instr.results[0])
    if isinstance(inner, Ids) and source.rank == 2 and source.shape[0] == 1 and to.shape == source.shape[1:]:
        return replace(inner, layout="flat")  # one row of an index's transpose
    if isinstance(inner, Rows | Ids):
        layout = relayout(lifter, source, inner.layout, to)
        if layout is None:
            return NoMatch(f"reshape {source} → {to} mixes rows", instr.results[0])
        pair = "et" if inner.space.kind == "dense" else "tk"
        if layout == "two" and inner.space.kind == "sorted":
            return NoMatch(
                f"rows in expert order are reshaped to {to} before they are put back in token order", instr.results[0]
            )
        return replace(inner, layout="flat" if layout == "flat" else pair)
    if isinstance(inner, Gates):
        return _gate_rows(inner, source, to)
    if isinstance(inner, OneHot):
        axes = _mask_axes(lifter, inner, source, to)
        return NoMatch(f"mask reshaped to {to}", instr.results[0]) if axes is None else replace(inner, axes=axes)
    if _real(source.shape) == _real(to.shape):
        return inner
    return NoMatch(f"reshape {source} → {to} of {type(inner).__name__}", instr.results[0])


def _gate_rows(gates: Gates, source: Type, to: Type) -> Lift:
    """[E, T] → [E·T, 1] or [E, T, 1]: one gate for each expert and token."""
    experts = source.shape[0]
    if not experts.is_Integer or not same(sympy.prod(to.shape), sympy.prod(source.shape)) or _real(to.shape[2:]):
        return NoMatch(f"gates reshaped {source} → {to}", gates.value)
    layout = "et" if to.shape[:2] == source.shape else "flat"
    return Rows(Space("dense", int(experts)), Gate(gates.value), layout)


def _slots_of(lifter: Lifter, instr: Instr) -> Lift:
    """A [T, k] tensor flattened or given axes of size 1: one number a slot. [T, H] → [T, 1, H]: tokens."""
    arg, to = instr.args[0], instr.types[0]
    source = lifter.type(arg)
    assert isinstance(arg, Ref)
    if (
        source.rank == 2
        and to.rank == 3
        and to.shape == (source.shape[0], sympy.S.One, source.shape[1])
        and source.shape[1] != 1
    ):
        return Rows(Space("slots", 1), Token(arg.name), "tk")
    if source.rank not in (1, 2) or (source.rank == 2 and not source.shape[1].is_Integer):
        return NoMatch(f"reshape {source} → {to} is not of a [T, k] tensor", instr.results[0])
    k = int(source.shape[1]) if source.rank == 2 else 1
    flat = to.rank >= 1 and same(to.shape[0], sympy.prod(source.shape)) and not _real(to.shape[1:])
    pair = to.rank >= 3 and to.shape[:2] == source.shape and not _real(to.shape[2:])
    if not (flat or pair):
        return NoMatch(f"reshape {source} → {to} is not one number a slot", instr.results[0])
    space, layout = Space("slots", k), "flat" if flat else "tk"
    if source.dtype in INTEGER:
        return Ids(space, "expert", arg.name, layout)
    return Rows(space, Slot(arg.name), layout)


def tried_first(rules: Mapping[str, Rule], first: Mapping[str, First]) -> Mapping[str, Rule]:
    """The rules, with others tried before those of the same word; what these know nothing of (None) goes on."""

    def before(word: str) -> Rule:
        then = rules.get(word)

        def rule(lifter: Lifter, instr: Instr, which: int) -> Lift:
            found = first[word](lifter, instr, which)
            if found is None and then is not None:
                return then(lifter, instr, which)
            return NoMatch(f"no row meaning for `{word}`", instr.results[0]) if found is None else found

        return rule

    return {**rules, **{word: before(word) for word in first}}


def rule_permute(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Another order of axes: of a mask, of an expert's matrix, or of features of size 1."""
    inner = lifter.lift(instr.args[0])
    order = instr.numbers("dims")
    if isinstance(inner, OneHot):
        return replace(inner, axes=tuple(inner.axes[d] for d in order))
    if isinstance(inner, Expert):
        return replace(inner, order=tuple(inner.order[d] for d in order))
    if isinstance(inner, Rows):
        shape = lifter.type(instr.args[0]).shape
        kept = order[: inner.lead] == tuple(range(inner.lead))
        moved = order != tuple(sorted(order)) and len(_real(shape[inner.lead :])) > 1
        if kept and not moved and _real(shape[inner.lead :]) == _real(instr.types[0].shape[inner.lead :]):
            return inner
        if kept and isinstance(inner.row, Expert):
            return replace(
                inner, row=replace(inner.row, order=tuple(inner.row.order[d - inner.lead] for d in order[inner.lead :]))
            )
    if isinstance(inner, NoMatch) and order == (len(order) - 1, *range(len(order) - 1)) and len(order) > 1:
        return Gates(instr.args[0].name) if isinstance(instr.args[0], Ref) else inner
    return NoMatch(f"permute{order} of rows", instr.results[0])


def rule_cast(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A cast of integers or masks changes nothing; of rows it is part of their program."""
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, Rows):
        if instr.types[0].dtype not in FLOATS:
            return NoMatch(f"rows are cast to {instr.types[0].dtype}", instr.results[0])
        return replace(inner, row=Cast(inner.row, instr.types[0].dtype))
    return inner


def rule_same(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """The same value under another name."""
    return lifter.lift(instr.args[0])


def per_expert(what: str, source: str) -> Rule:
    """A rule that turns one number per expert into another."""

    def rule(lifter: Lifter, instr: Instr, _which: int) -> Lift:
        inner = lifter.lift(instr.args[0])
        if isinstance(inner, PerExpert) and inner.what == source:
            return replace(inner, what=what)
        return inner if isinstance(inner, NoMatch) else NoMatch(f"`{instr.word}` of {inner}", instr.results[0])

    return rule
