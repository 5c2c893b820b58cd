"""The row rules of indices: which rows an index, a gather, a sort or a repeat picks, and where it puts them."""

from __future__ import annotations

from dataclasses import replace

import sympy

from moec.ir.graph import Arg, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.dispatch.mapped import at_pairs
from moec.passes.dispatch.thresholds import table_axes
from moec.passes.rows.coded import repeated
from moec.passes.rows.lift import INTEGER, Lift, Lifter
from moec.passes.rows.rows import (
    Column,
    Expert,
    Gate,
    Ids,
    Masked,
    Rows,
    Slot,
    Space,
    Token,
)
from moec.passes.rows.token_axes import as_token, base_of, choice_axes, is_token, names_once, one_expert


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
    if len(rows) == 1:
        return _index_one(lifter, instr, table, rows[0])
    return _index_many(lifter, instr, table, rows)


def _index_many(lifter: Lifter, instr: Instr, table: Ref, ids: list[Ids]) -> Lift:
    """w[t, s], w[a, b, s]: one number a slot; g[t, e]: a gate of its expert; x[a, b]: rows of tokens on more axes."""
    chosen = {i.choice for i in ids} - {""}
    first, what = replace(ids[0], choice=next(iter(chosen), "")), tuple(i.what for i in ids)
    if len(chosen) > 1 or any((i.space, i.layout) != (first.space, first.layout) for i in ids):
        return NoMatch("indexed by the places of different masks", instr.results[0])
    if what == ("token", "slot"):
        return Rows(first.space, Slot(table.name), first.layout, first.choice)
    pairs = at_pairs(lifter, instr, table, ids) if len(ids) == 2 else None
    if pairs is not None:
        return pairs
    if what == ("token", "expert") and lifter.type(table).rank == 2:
        return Rows(first.space, Gate(table.name), first.layout, first.choice)
    tokens = what[:-1] if what[-1] == "slot" else what
    if not is_token(lifter.graph, first.choice, tokens) and tokens != table_axes(lifter, first.choice):
        return NoMatch(f"indexed by {what}, expected (token, slot)", instr.results[0])
    if what[-1] == "slot":
        return Rows(first.space, Slot(table.name), first.layout, first.choice)
    return _index_one(lifter, instr, table, replace(first, what="token"), len(tokens))


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


def _one_a_token(lifter: Lifter, kind: Type, choice: str, axes: int) -> bool:
    """Whether a table has one number for each token, and a token one expert: w[…] or w[…, 1] for e[…] or e[…, 1]."""
    chosen = lifter.graph.types.get(base_of(choice))
    if chosen is None:
        return False
    narrow = kind.rank >= axes and all(size == 1 for size in kind.shape[axes:])
    if narrow and "s" not in choice_axes(lifter.graph, base_of(choice)):
        return True
    return narrow and axes == chosen.rank - 1 and chosen.shape[-1] == 1


def _index_one(lifter: Lifter, instr: Instr, table: Ref, ids: Ids, axes: int = 1) -> Lift:
    """Rows of a table at one index, or, by tokens, at the `axes` indices that name them."""
    kind, ids = lifter.type(table), as_token(lifter.graph, ids)
    if ids.what == "expert" and kind.dtype in ("i64", "i32"):
        return NoMatch(f"%{table.name}: {kind} holds whole numbers, expected experts' parameters", instr.results[0])
    if ids.what == "expert":
        return Rows(ids.space, Expert((table.name,), tuple(range(kind.rank - 1)), True), ids.layout, ids.choice)
    inner = lifter.lift(table)
    if ids.what == "token":
        if isinstance(inner, Masked) and inner.summed and inner.anchor == ids.space.key:
            base = base_of(inner.choice)
            part = ids.choice.startswith(f"{inner.choice}#") and names_once(lifter.graph, base)
            return Rows(ids.space, Slot(inner.value), ids.layout, ids.choice if part else inner.choice)
        if isinstance(inner, Column) and inner.key == ids.space.key:
            return Rows(ids.space, Gate(inner.value), ids.layout, ids.choice)
        if _one_a_token(lifter, kind, ids.choice, axes):
            return Rows(ids.space, Slot(table.name), ids.layout, ids.choice)  # w[T] of one expert a token
        if kind.rank <= axes:
            return NoMatch(f"rows are taken from {kind}, expected [T, H]", table.name)
        return Rows(ids.space, Token(table.name), ids.layout, ids.choice)
    if ids.what == "flat" and isinstance(inner, Rows | Ids) and inner.space.kind == "slots" and inner.layout == "flat":
        space, choice = replace(ids.space, k=inner.space.k), inner.choice or ids.choice
        if isinstance(inner, Ids):
            return replace(inner, space=space, choice=choice)
        return Rows(space, inner.row, ids.layout, choice, anchor=inner.anchor, earlier=inner.earlier)
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
    whole = inner.what == "token" and one_expert(lifter.graph, inner.choice)  # a token's one place is its number
    if (inner.what == "flat" or whole) and inner.space.kind == "sorted" and which == 1:
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
    inner = lifter.lift(arg)
    if isinstance(inner, Expert):
        return repeated(instr, inner)
    if instr.attr("dim") != 0 or not isinstance(k, int) or not isinstance(arg, Ref):
        return NoMatch("repeat_interleave along another axis than tokens", instr.results[0])
    made = lifter.instr(arg)
    if made is not None and made.word == "arange":
        return Ids(Space("slots", k), "token")
    if lifter.type(arg).rank < 2:
        return NoMatch(f"repeat_interleave of {lifter.type(arg)}, expected [T, H]", instr.results[0])
    return Rows(Space("slots", k), Token(arg.name))


def rule_expand(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """[T, 1, H] → [T, k, H]: each token in each of its slots; arange(T)[:, None] → [T, k]: the token of every slot."""
    inner, to = lifter.lift(instr.args[0]), instr.types[0]
    if (
        isinstance(inner, Rows)
        and isinstance(inner.row, Token)
        and inner.space == Space("slots", 1)
        and to.rank >= 2
        and to.shape[1].is_Integer
    ):
        return replace(inner, space=Space("slots", int(to.shape[1])))
    counted = _counted(lifter, instr)
    if counted is not None:
        return counted
    return inner if isinstance(inner, NoMatch) else NoMatch(f"expanded to {to}", instr.results[0])


def _counted(lifter: Lifter, instr: Instr) -> Ids | None:
    """arange(T)[None].expand(E, T): the token of every pair of expert and token; arange(T)[:, None].expand(T, k): of
    every slot. Or their `repeat`."""
    to, source = instr.types[0], lifter.type(instr.args[0])
    made = lifter.instr(lifter.graph.behind(instr.args[0], ("reshape", "cast", "same")))
    if made is None or made.word != "arange" or to.rank != 2:
        return None
    if source.shape in (to.shape[1:], (sympy.S.One, *to.shape[1:])) and to.shape[0].is_Integer and to.shape[0] != 1:
        return Ids(Space("dense", int(to.shape[0])), "token", layout="et")
    if source.shape == (to.shape[0], sympy.S.One) and to.shape[1].is_Integer:
        return Ids(Space("slots", int(to.shape[1])), "token", layout="tk")
    return None


def rule_repeat(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """x.repeat(E, 1): every token for every expert. x[T, 1, H].repeat(1, k, 1): each token in each of its slots."""
    arg, reps = instr.args[0], instr.attr("reps")
    sizes = lifter.type(arg).shape
    if isinstance(reps, tuple) and len(reps) == len(sizes) >= 2 and sizes[1] == 1 and set(reps[:1] + reps[2:]) == {1}:
        return rule_expand(lifter, instr, _which)
    if (
        isinstance(arg, Ref)
        and isinstance(reps, tuple)
        and lifter.type(arg).rank == 2
        and len(reps) == 2
        and reps[1] == 1
    ) and isinstance(reps[0], int):
        return Rows(Space("dense", reps[0]), Token(arg.name))
    counted = _counted(lifter, instr)
    if counted is not None:
        return counted
    return NoMatch(f"repeat{reps} is not every token for every expert", instr.results[0])
