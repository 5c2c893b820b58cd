"""Lift values of a graph to row programs: the driver, and the rules for index values and views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import sympy

from moec.graph import Arg, Dim, Graph, Instr, Ref, Type
from moec.match import NoMatch
from moec.passes.hot import Hot
from moec.passes.rows import (
    Body,
    Cast,
    Expert,
    Gate,
    Gates,
    Ids,
    Lifted,
    Masked,
    OneHot,
    Part,
    PerExpert,
    Rows,
    Slot,
    Space,
    Token,
)

Lift = Lifted | NoMatch
Rule = Callable[["Lifter", Instr, int], Lift]

INTEGER = frozenset({"i64", "i32", "i16", "i8", "u8"})
FLOATS = frozenset({"f32", "bf16", "f16", "f64"})


@dataclass
class Lifter:
    """Lifts values on demand, each once.

    beyond    anchor → an expert id that its loop skips; harmless when no expert has it
    masks     the lifter that knows what masks of capacity routing mean
    partial   anchor → the experts that its loop runs, where it skips those of one side
    kept      a name → the mask of choices that it stands for, of which some are dropped (`moec.passes.kept`)
    fallback  asked about what no rule knows, with the result's place and the rule's miss
    """

    graph: Graph
    rules: Mapping[str, Rule]
    masks: Lifter | None = None
    memo: dict[str, Lift] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)
    partial: dict[str, Part] = field(default_factory=dict)
    kept: dict[str, Hot] = field(default_factory=dict)
    fallback: Callable[[Lifter, Instr, int, NoMatch], Lift] | None = None

    def lift(self, arg: Arg) -> Lift:
        """What `arg` is in terms of rows, or why that cannot be said."""
        if not isinstance(arg, Ref):
            return NoMatch(f"{arg!r} is a literal")
        if arg.name not in self.memo:
            instr = self.graph.defs.get(arg.name)
            if instr is None:
                self.memo[arg.name] = NoMatch(f"%{arg.name} is an input of the graph", arg.name)
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


def same(a: Dim | int, b: Dim | int) -> bool:
    """Whether two sizes are provably equal."""
    return a == b or sympy.expand(sympy.sympify(a) - b) == 0


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


def rule_reshape(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A reshape that only splits or joins the row axes, or adds and drops axes of size 1."""
    source, to = lifter.type(instr.args[0]), instr.types[0]
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, NoMatch):
        return _slots_of(lifter, instr)
    if isinstance(inner, Body):
        return NoMatch("a reshape inside an expert's own code", instr.results[0])
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
    if _real(source.shape) == _real(to.shape):
        if isinstance(inner, OneHot):
            axes = _with_units(inner.axes, source, to)
            return NoMatch(f"mask reshaped to {to}", instr.results[0]) if axes is None else replace(inner, axes=axes)
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


def rule_permute(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Another order of axes: of a mask, of an expert's matrix, or of features of size 1."""
    inner = lifter.lift(instr.args[0])
    dims = instr.attr("dims")
    assert isinstance(dims, tuple)
    order = [int(d) for d in dims if isinstance(d, int)]
    if isinstance(inner, OneHot):
        return replace(inner, axes=tuple(inner.axes[d] for d in order))
    if isinstance(inner, Expert):
        return replace(inner, order=tuple(inner.order[d] for d in order))
    if isinstance(inner, Rows):
        shape = lifter.type(instr.args[0]).shape
        kept = order[: inner.lead] == list(range(inner.lead))
        if kept and _real(shape[inner.lead :]) == _real(instr.types[0].shape[inner.lead :]):
            return inner
        if kept and isinstance(inner.row, Expert):
            return replace(
                inner, row=replace(inner.row, order=tuple(inner.row.order[d - inner.lead] for d in order[inner.lead :]))
            )
    if isinstance(inner, NoMatch) and order == [1, 0] and isinstance(instr.args[0], Ref):
        return Gates(instr.args[0].name)
    return NoMatch(f"permute{tuple(order)} of rows", instr.results[0])


def rule_cast(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A cast of integers or masks changes nothing; of rows it is part of their program."""
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, Rows):
        if instr.types[0].dtype not in FLOATS:
            return NoMatch(f"rows are cast to {instr.types[0].dtype}", instr.results[0])
        return replace(inner, row=Cast(inner.row, instr.types[0].dtype))
    if isinstance(inner, NoMatch) or not isinstance(inner, Expert):
        return inner
    return NoMatch(f"an expert's parameter is cast to {instr.types[0].dtype}", instr.results[0])


def rule_same(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """The same value under another name."""
    return lifter.lift(instr.args[0])


def rule_index(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """x[ids]: tokens, slots, or experts' parameters, one for each row."""
    table, *ids = instr.args
    if instr.attr("dim") != 0:
        return NoMatch(f"indexed along axis {instr.attr('dim')}, expected 0", instr.results[0])
    found = [lifter.lift(i) for i in ids]
    if len(ids) == 1 and isinstance(found[0], NoMatch):
        found = [choice_of(lifter, ids[0], found[0])]
    misses = [f for f in found if isinstance(f, NoMatch)]
    if misses:
        return misses[0]
    if not all(isinstance(f, Ids) for f in found) or not isinstance(table, Ref):
        return NoMatch("indexed by something else than tokens, slots or experts", instr.results[0])
    rows = [f for f in found if isinstance(f, Ids)]
    what = tuple(f.what for f in rows)
    if what == ("token", "slot"):
        return Rows(rows[0].space, Slot(table.name), rows[0].layout, rows[0].choice)
    if len(rows) == 1:
        return _index_one(lifter, instr, table, rows[0])
    return NoMatch(f"indexed by {what}, expected (token, slot)", instr.results[0])


def choice_of(lifter: Lifter, arg: Arg, miss: NoMatch) -> Lift:
    """Integers [T, k] or [T] that index as they are: the chosen experts of each token."""
    kind = lifter.type(arg)
    if not isinstance(arg, Ref) or kind.dtype not in INTEGER or kind.rank not in (1, 2):
        return miss
    if kind.rank == 1:
        return Ids(Space("slots", 1), "expert", arg.name)
    if not kind.shape[1].is_Integer:
        return miss
    return Ids(Space("slots", int(kind.shape[1])), "expert", arg.name, "tk")


def row_ids(lifter: Lifter, wide: Arg) -> Lift:
    """The [rows] ids behind an index expanded to [rows, H]."""
    made = lifter.instr(wide)
    while made is not None and made.word in ("expand", "reshape", "repeat"):
        found = lifter.lift(made.args[0])
        if isinstance(found, Ids):
            return found
        made = lifter.instr(made.args[0])
    return NoMatch("an index of whole rows is not one token a row")


def rule_gather(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """x.gather(0, ids[:, None].expand(-1, H)) is x[ids]."""
    table, wide = instr.args
    ids = row_ids(lifter, wide) if instr.attr("dim") == 0 else NoMatch("no row meaning for `gather`", instr.results[0])
    if not isinstance(ids, Ids) or not isinstance(table, Ref):
        return ids if isinstance(ids, NoMatch) else NoMatch("gathers by something else than tokens", instr.results[0])
    if lifter.type(table).rank != 2 or lifter.type(wide).shape[1:] != lifter.type(table).shape[1:]:
        return NoMatch("gathers parts of rows", instr.results[0])
    return _index_one(lifter, instr, table, ids)


def _index_one(lifter: Lifter, instr: Instr, table: Ref, ids: Ids) -> Lift:
    kind = lifter.type(table)
    if ids.what == "expert":
        return Rows(ids.space, Expert((table.name,), tuple(range(kind.rank - 1)), True), ids.layout, ids.choice)
    inner = lifter.lift(table)
    if ids.what == "token":
        if isinstance(inner, Masked) and inner.summed and inner.anchor == ids.space.key:
            return Rows(ids.space, Slot(inner.value), ids.layout, inner.choice)
        chosen = lifter.graph.types.get(ids.choice)
        if kind.rank == 1 and chosen is not None and chosen.rank == 1:
            return Rows(ids.space, Slot(table.name), ids.layout, ids.choice)  # w[T] of one expert a token
        if kind.rank < 2:
            return NoMatch(f"rows are taken from {kind}, expected [T, H]", table.name)
        return Rows(ids.space, Token(table.name), ids.layout, ids.choice)
    if ids.what == "flat" and isinstance(inner, Rows | Ids) and inner.space.kind == "slots" and inner.layout == "flat":
        if isinstance(inner, Ids):
            return replace(inner, space=replace(ids.space, k=inner.space.k))
        space = replace(ids.space, k=inner.space.k)
        return Rows(space, inner.row, ids.layout, inner.choice, anchor=inner.anchor, earlier=inner.earlier)
    if ids.what == "inverse" and isinstance(inner, Rows) and inner.space.key == ids.space.key:
        choice = inner.choice or ids.choice
        return Rows(Space("slots", inner.space.k), inner.row, "flat", choice, "sorted", inner.anchor, inner.earlier)
    return NoMatch(f"rows indexed by {ids.what} positions of {ids.space.kind}", instr.results[0])


def rule_sort(lifter: Lifter, instr: Instr, which: int) -> Lift:
    """Sorting the flat expert ids puts rows in expert order; sorting that permutation inverts it."""
    inner = lifter.lift(instr.args[0])
    if not isinstance(inner, Ids) or lifter.type(instr.args[0]).rank != 1 or instr.attr("descending"):
        return NoMatch("sorts something else than the flat expert ids, ascending", instr.results[0])
    key = instr.results[1]
    if inner.what == "expert" and inner.space.kind == "slots":
        return Ids(Space("sorted", inner.space.k, key), "flat" if which == 1 else "expert", inner.choice)
    if inner.what == "flat" and inner.space.kind == "sorted" and which == 1:
        return Ids(inner.space, "inverse", inner.choice)
    return NoMatch(f"sorts {inner.what} ids of {inner.space.kind} rows", instr.results[0])


def rule_floor_divide(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """flat // k is the token."""
    inner, by = lifter.lift(instr.args[0]), instr.args[1]
    if isinstance(inner, Ids) and inner.what == "flat" and inner.space.k == by:
        return replace(inner, what="token")
    return (
        inner if isinstance(inner, NoMatch) else NoMatch(f"row positions divided by {by}, expected k", instr.results[0])
    )


def rule_remainder(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """flat % k is the slot."""
    inner, by = lifter.lift(instr.args[0]), instr.args[1]
    if isinstance(inner, Ids) and inner.what == "flat" and inner.space.k == by:
        return replace(inner, what="slot")
    return inner if isinstance(inner, NoMatch) else NoMatch(f"row positions modulo {by}, expected k", instr.results[0])


def rule_index_put(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """inv[perm] = arange: the inverse of the sort's permutation."""
    if instr.word == "index_put":
        _base, source, *ids = instr.args
        if instr.attr("accumulate"):
            return NoMatch("adds positions instead of writing them", instr.results[0])
    else:
        _base, index, source = instr.args
        ids = [index]
    made = lifter.instr(source)
    inner = lifter.lift(ids[0]) if len(ids) == 1 else NoMatch("several index tensors", instr.results[0])
    if isinstance(inner, NoMatch):
        return inner
    if (
        made is not None
        and made.word == "arange"
        and isinstance(inner, Ids)
        and inner.what == "flat"
        and inner.space.kind == "sorted"
    ):
        return Ids(inner.space, "inverse", inner.choice)
    return NoMatch("writes something else than positions in sorted order", instr.results[0])


def rule_repeat_interleave(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Each token k times in a row: rows in slot order."""
    arg, k = instr.args[0], instr.attr("repeats")
    if instr.attr("dim") != 0 or not isinstance(k, int) or not isinstance(arg, Ref):
        return NoMatch("repeat_interleave along another axis than tokens", instr.results[0])
    made = lifter.instr(arg)
    if made is not None and made.word == "arange":
        return Ids(Space("slots", k), "token")
    if lifter.type(arg).rank < 2:
        return NoMatch(f"repeat_interleave of {lifter.type(arg)}, expected [T, H]", instr.results[0])
    return Rows(Space("slots", k), Token(arg.name))


def rule_expand(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """[T, 1, H] → [T, k, H]: each token in each of its slots."""
    inner, to = lifter.lift(instr.args[0]), instr.types[0]
    if (
        isinstance(inner, Rows)
        and isinstance(inner.row, Token)
        and inner.space == Space("slots", 1)
        and to.rank >= 2
        and to.shape[1].is_Integer
    ):
        return replace(inner, space=Space("slots", int(to.shape[1])))
    return inner if isinstance(inner, NoMatch) else NoMatch(f"expanded to {to}", instr.results[0])


def rule_repeat(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """x.repeat(E, 1): every token for every expert."""
    arg, reps = instr.args[0], instr.attr("reps")
    if (
        isinstance(arg, Ref)
        and isinstance(reps, tuple)
        and lifter.type(arg).rank == 2
        and len(reps) == 2
        and reps[1] == 1
    ) and isinstance(reps[0], int):
        return Rows(Space("dense", reps[0]), Token(arg.name))
    return NoMatch(f"repeat{reps} is not every token for every expert", instr.results[0])


def per_expert(what: str, source: str) -> Rule:
    """A rule that turns one number per expert into another."""

    def rule(lifter: Lifter, instr: Instr, _which: int) -> Lift:
        inner = lifter.lift(instr.args[0])
        if isinstance(inner, PerExpert) and inner.what == source:
            return replace(inner, what=what)
        return inner if isinstance(inner, NoMatch) else NoMatch(f"`{instr.word}` of {inner}", instr.results[0])

    return rule
