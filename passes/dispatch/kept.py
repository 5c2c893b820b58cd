"""A loop whose rows are chosen by a mask that also drops some: Switch's expert loop with a capacity.

mask = one_hot(ids) · (cumsum(one_hot(ids)) ≤ C); for e: rows = where(mask[e])   →   the loop over where(kept, ids, −1)
rows = where((ids == e) & kept)   →   the same
"""

from __future__ import annotations

from dataclasses import replace

from moec.ir.graph import Arg, Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.capacity.infer import always
from moec.passes.dispatch.turns import same_each_turn
from moec.passes.rows.hot import Cond, Hot, letters_of
from moec.passes.rows.lift import Lifter, same
from moec.passes.rows.pairs import Choice, Writer, routed
from moec.passes.rows.rows import OneHot


def kept_mask(lifter: Lifter, arg: Arg) -> OneHot | None:
    """A mask of chosen experts of which some are dropped, over t, s and e; its choice is known by `lifter.kept`."""
    hot = lifter.masks.lift(arg) if lifter.masks is not None else None
    if not isinstance(hot, Hot) or not hot.unit or hot.summed or hot.at >= 0 or lifter.masks is None or "[" in hot.base:
        return None
    axes = _axes(lifter.graph, hot)
    if axes is None:
        return None
    only = frozenset(cond for cond in hot.only if not always(lifter.masks, cond))
    return OneHot(_named(lifter, replace(hot, only=only)), axes)


def cut_mask(lifter: Lifter, chosen: OneHot, arg: Arg) -> OneHot | None:
    """(ids == e) & kept: the loop's mask without the pairs that a mask leaves out which is the same in each turn."""
    kind = lifter.type(arg)
    if not isinstance(arg, Ref) or kind.dtype != "bool" or chosen.axes not in (("t",), ("t", "s")):
        return None
    whole = lifter.kept.get(chosen.choice)
    base = chosen.choice if whole is None else whole.base
    if base not in lifter.graph.types or kind.shape != lifter.graph.types[base].shape:
        return None
    if not same_each_turn(lifter.graph, arg.name, chosen.anchor):
        return None
    axes = letters_of(kind.rank)
    only = frozenset({Cond(arg.name, axes)}) | (frozenset() if whole is None else whole.only)
    return replace(chosen, choice=_named(lifter, Hot(base, (*axes, "e"), only)))


def _named(lifter: Lifter, hot: Hot) -> str:
    """The name that a mask of kept pairs is known by."""
    name = "#".join((hot.base, *sorted(f"{'~' * cond.inverse}{cond.witness}" for cond in hot.only)))
    lifter.kept[name] = hot
    return name


def _axes(graph: Graph, hot: Hot) -> tuple[str, ...] | None:
    """A mask's labels as t, s and e: one slot a token, or the choice's last axis."""
    letters = letters_of(graph.types[hot.base].rank)
    token = "".join(letters)
    names = {"e": "e", token: "t"}
    if len(letters) > 1:
        names |= {"".join(letters[:-1]): "t", letters[-1]: "s"}
    if token in hot.axes and hot.axes.count("1") == 1:
        names["1"] = "s"
    found = tuple(names.get(label, "") for label in hot.axes)
    return found if all(found) and len(set(found)) == len(found) and {"t", "e"} <= set(found) else None


def kept_choice(lifter: Lifter, root: Instr, name: str) -> tuple[tuple[Instr, ...], str] | NoMatch:
    """Instructions that make the experts e[T, k] of a choice known by `lifter.kept`, −1 where a pair is dropped."""
    hot = lifter.kept[name]
    letters = "".join(letters_of(lifter.graph.types[hot.base].rank))
    slots = letters[-1:] if len(letters) > 1 and letters[:-1] in hot.axes else ""
    out = Writer(lifter.graph, root)
    found = routed(out, Choice(hot.base, slots), (), tuple(hot.only), "f32")
    return found if isinstance(found, NoMatch) else (tuple(out.instrs), found[1])


def made_shape(lifter: Lifter, instrs: tuple[Instr, ...], choice: str, weight: str) -> NoMatch | None:
    """None where the weights are as many as the choices that were made."""
    kind = next((i.types[0] for i in instrs if i.results[0] == choice), None) or lifter.graph.types[choice]
    given = lifter.graph.types[weight]
    if given.rank == kind.rank and all(same(a, b) for a, b in zip(given.shape, kind.shape, strict=True)):
        return None
    return NoMatch(f"routing weights are {given} for choices {kind}", Ref(weight).name)
