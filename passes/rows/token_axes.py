"""Tokens on several axes: x[B, S, H] is x[T, H] whose T is written as B and S, in masks, indices, choices and sums.

A choice e[B, S, k] has the axes `a`, `b` and `s`; joined, its tokens' axes are `t`, all of its axes its flat slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from moec.ir.dims import Dim
from moec.ir.graph import Graph, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.rows.hot import letters_of, relabel, same
from moec.passes.rows.pairs import Writer
from moec.passes.rows.rows import Ids

MOST = 3
"""The most axes that tokens are looked for on."""


def choice_axes(graph: Graph, choice: str) -> tuple[str, ...]:
    """The axes of a choice: those of its tokens, then `s` where a token has several experts; () where it has too many.

    Integers that an argmax gave have no slots; others do where they have two axes or more.
    """
    rank = graph.types[choice].rank
    single = rank == 1 or _one_a_token(graph, choice)
    tokens = rank if single else rank - 1
    if not 1 <= tokens <= MOST:
        return ()
    return (*token_letters(tokens), *(() if single else ("s",)))


def token_letters(count: int) -> tuple[str, ...]:
    """The labels of so many axes of tokens."""
    return ("t",) if count == 1 else letters_of(count)


def _one_a_token(graph: Graph, choice: str) -> bool:
    """Whether an argmax took the axis of experts away, or one slot of a top-k's was taken, as in ids[:, :, 0]."""
    found = graph.behind(Ref(choice), ("cast", "same", "detach"))
    made = graph.defs.get(found.name) if isinstance(found, Ref) else None
    if made is None or not made.uses:
        return False
    source = graph.types[made.uses[0]]
    if made.word in ("max", "argmax"):
        return made.types[-1].rank < source.rank
    column = graph.defs.get(made.uses[0])
    if made.word != "reshape" or column is None or source.shape != (*made.types[0].shape, 1):
        return False
    if column.word == "slice":
        return column.attr("dim") == source.rank - 1 and _is_top(graph, column.uses[0])
    return _is_top(graph, made.uses[0])


def _is_top(graph: Graph, name: str) -> bool:
    """Whether a value is what a top-k along its last axis chose."""
    found = graph.behind(Ref(name), ("cast", "same", "detach"))
    made = graph.defs.get(found.name) if isinstance(found, Ref) else None
    return made is not None and made.word in ("topk", "sort") and made.attr("dim") == made.types[0].rank - 1


def token_axes(graph: Graph, choice: str) -> tuple[str, ...]:
    """The axes of a choice's tokens."""
    return tuple(a for a in choice_axes(graph, choice) if a != "s")


def base_of(choice: str) -> str:
    """The choice that another is part of: some of its pairs, by a mask, their weights or their places."""
    return choice.partition("#")[0]


def one_expert(graph: Graph, choice: str) -> bool:
    """Whether a token has one expert at most, by a choice or by part of one."""
    chosen = graph.types.get(base_of(choice))
    return chosen is not None and ("s" not in choice_axes(graph, base_of(choice)) or chosen.shape[-1] == 1)


def is_token(graph: Graph, choice: str, what: Sequence[str]) -> bool:
    """Whether indices along these axes name a choice's token: its tokens' axes in order, all that are not of size 1."""
    choice = base_of(choice)
    if tuple(what) == ("token",) or choice not in graph.types:
        return tuple(what) == ("token",)
    tokens = token_axes(graph, choice)
    left = [axis for axis, size in zip(tokens, graph.types[choice].shape, strict=False) if size != 1 or axis in what]
    return bool(what) and list(what) == left


def as_token(graph: Graph, ids: Ids) -> Ids:
    """Ids along one axis of a choice's tokens name tokens where its others are of size 1; others stay what they are."""
    return replace(ids, what="token") if is_token(graph, ids.choice, (ids.what,)) else ids


def order_of(axes: Sequence[str], tokens: Sequence[str]) -> str:
    """Axes as the order of rows, outermost first, the tokens' axes as `t` where they stand together."""
    return "".join(axes).replace("".join(tokens), "t")


def reshaped(graph: Graph, choice: str, axes: tuple[str, ...], source: Type, to: Type) -> tuple[str, ...] | None:
    """A mask's axes after a reshape that joins or splits tokens' axes and slots, or adds and drops axes of size 1."""
    whole, shape = choice_axes(graph, choice), graph.types[choice].shape
    sizes: dict[str, Dim] = dict(zip(whole, shape, strict=False))
    sizes |= {label: size for label, size in zip(axes, source.shape, strict=True) if len(label) == 1}
    tokens = tuple(a for a in whole if a != "s")
    if axes == tokens and to.rank == 1:
        return ("t",)
    apart = tuple("".join(tokens) if a == "t" and len(tokens) > 1 else a for a in axes)
    found = relabel(axes, sizes, to.shape) or relabel(
        apart, sizes, to.shape
    )  # what is joined stays joined where it can
    if found is None and "s" in apart and sizes["s"] == 1:  # the one slot of a token
        found = relabel(tuple(a for a in apart if a != "s"), sizes, to.shape)
    if found is None:
        return None
    slots = f"{int(sizes['s'])}" if "s" in sizes and sizes["s"].is_Integer else ""
    flat = "".join(whole)
    return tuple("t" if a == "".join(tokens) else slots if a == flat and slots else a for a in found)


def names_once(graph: Graph, choice: str) -> bool:
    """Whether no token chooses an expert twice: it has one, or they are a top-k's along its own axis."""
    if "s" not in choice_axes(graph, choice):
        return True
    name, slots = choice, graph.types[choice].shape[-1]
    if slots == 1:
        return True
    while (made := graph.defs.get(name)) is not None and made.word in ("cast", "same", "detach", "reshape", "slice"):
        name = made.uses[0]
        if graph.types[name].rank == 0 or (made.word == "reshape" and graph.types[name].shape[-1] != slots):
            return False
        slots = graph.types[name].shape[-1]  # some of those that are chosen once are chosen once
    kind = graph.types[name]
    return made is not None and made.word == "topk" and made.attr("dim") == kind.rank - 1


def shaped_like(graph: Graph, name: str, shape: tuple[Dim, ...]) -> str:
    """A value that `name` is a view of and that has this shape, to reshape by; '' where there is none."""
    while name and graph.types[name].shape != shape:
        made = graph.defs.get(name)
        name = made.uses[0] if made is not None and made.word in ("reshape", "cast", "same") else ""
    return name


def slots_of(graph: Graph, choice: str) -> Dim | None:
    """How many experts a token has; None where `choice` is no value of the graph."""
    if choice not in graph.types:
        return None
    return graph.types[choice].shape[-1] if "s" in choice_axes(graph, choice) else sympy.S.One


def _more(columns: Dim, slots: Dim) -> bool:
    return columns.is_Integer and slots.is_Integer and int(columns) > int(slots)


def as_pairs(out: Writer, weights: str, choice: str, slots: Dim | None, dtype: str) -> tuple[str, str] | NoMatch:
    """w[T, k] and e[T, k] of tokens on any axes, k = `slots` (None: as `choice` has); w is 1 where none is named."""
    choice = out.column(choice)
    kind = out.type(choice)
    if slots is None:
        slots = kind.shape[-1] if kind.rank > 1 else sympy.S.One
    if not weights:
        weights = out.cast(out.emit("ge", (Ref(choice), 0), Type("bool", kind.shape)), dtype)
    weights = out.column(weights)
    given, count = out.type(weights), sympy.Mul(*kind.shape)
    slotted = kind.rank > 1 and same(kind.shape[-1], slots)
    if slotted and given.shape[:-1] == kind.shape[:-1] and _more(given.shape[-1], slots):
        given = Type(given.dtype, (*given.shape[:-1], slots))  # w[t, s] of more columns than there are slots
        weights = out.emit("narrow", (Ref(weights),), given, dim=given.rank - 1, start=0, length=int(slots))
    if not same(sympy.Mul(*given.shape), count) or (slots != 1 and given.shape[-1] != slots):
        return NoMatch(f"routing weights are {given} for choices {kind}", weights)
    pair = (count / slots, slots)
    return out.reshape(weights, pair), out.reshape(choice, pair)


def each_token(out: Writer, pairs: tuple[str, str], x: Type, rows: str) -> tuple[str, str] | NoMatch:
    """w[T, k] and e[T, k] for each of x's T = B·S tokens, where the pairs [B, k] are of whole sequences x[B, S, H]."""
    given, tokens = out.type(pairs[1]).shape[0], sympy.Mul(*x.shape[:-1])
    if same(given, tokens):
        return pairs
    if not any(same(given, sympy.Mul(*x.shape[:axes])) for axes in range(1, x.rank - 1)):
        return NoMatch(f"{given} choices are made for the tokens {x}", pairs[1])
    kinds = [Type(out.type(name).dtype, (tokens, *out.type(name).shape[1:])) for name in pairs]
    weights, choice = (
        out.emit("each_token", (Ref(name), Ref(rows)), kind) for name, kind in zip(pairs, kinds, strict=True)
    )
    return weights, choice


def at_choice(out: Writer, gates: str, choice: str) -> str | NoMatch:
    """w[T, k], the gates g[…, E] of the chosen experts."""
    given, slots = out.type(gates), slots_of(out.graph, choice)
    tokens = sympy.Mul(*given.shape[:-1])
    if slots is None or not same(tokens * slots, sympy.Mul(*out.type(choice).shape)):
        return NoMatch(f"gates are {given} for choices {out.type(choice)}", gates)
    table = out.reshape(gates, (tokens, given.shape[-1]))
    picked = out.reshape(choice, (tokens, slots))
    return out.emit("gather", (Ref(table), Ref(picked)), Type(given.dtype, (tokens, slots)), dim=1)


def seen(graph: Graph, name: str) -> str:
    """What a value is a view of: the same numbers in the same order."""
    held = graph.behind(Ref(name), ("reshape", "same"))
    assert isinstance(held, Ref)
    return held.name


def column_of(graph: Graph, name: str) -> tuple[str, int] | None:
    """(source[…, k], j) of a value that is source[…, j] in any shape."""
    made = graph.defs.get(seen(graph, name))
    if made is None or made.word not in ("slice", "narrow"):
        return None
    source, start, last = made.uses[0], made.attr("start"), made.types[0].rank - 1
    one = made.attr("dim") == last >= 1 and made.types[0].shape[-1] == 1
    return (source, start) if one and isinstance(start, int) else None
