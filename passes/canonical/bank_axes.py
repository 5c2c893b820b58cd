"""The experts' axis of a parameter first, wherever it is kept: [H, E, F] is seen as [E, H, F].

Which axis is the experts' is read off what happens to it: it stays apart in a product with matrices, it is indexed, or
gates have one number for it and none for the other axis. An axis that is last stays: rows of matrices lie in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moec.ir.graph import Arg, Instr, Ref, Type
from moec.passes.canonical.fold_permutes import folded
from moec.passes.canonical.rewriter import STORED, Rewriter, again
from moec.passes.canonical.split_axes import POINTS, inner_of
from moec.passes.raising.word_contract import equation_of, normal_equation


def rule_index(state: Rewriter, instr: Instr) -> Instr | None:
    """index(W[H, E, F], ids) along E: rows of the parameter with experts first, put where they were."""
    if instr.word != "index" or len(instr.args) != 2 or not state.stored(instr.args[0]):
        return None
    table, ids, dim = state.type(instr.args[0]), state.type(instr.args[1]), instr.attr("dim")
    if not isinstance(dim, int) or not 0 < dim < table.rank - 1 or ids.dtype not in ("i64", "i32"):
        return None
    rest = [i for i in range(table.rank) if i != dim]
    first = experts_first(state, instr.args[0], (dim, *rest))
    kind = Type(table.dtype, (*ids.shape, *(table.shape[i] for i in rest)))
    rows = state.emit("index", (first, instr.args[1]), kind, dim=0)
    back = (*range(ids.rank, ids.rank + dim), *range(ids.rank), *range(ids.rank + dim, kind.rank))
    return again(instr, "permute", (rows,), dims=back)


def experts_first(state: Rewriter, arg: Arg, order: Sequence[int]) -> Ref:
    """A parameter with its axes in another order, the first of them experts."""
    kind = state.type(arg)
    shape = tuple(kind.shape[i] for i in order)
    return state.emit("permute", (arg,), Type(kind.dtype, shape), dims=tuple(order), bank=True)


def rule_gathered(state: Rewriter, instr: Instr) -> Instr | None:
    """contract(permute(index(…))) reads the gathered matrices as they are."""
    if instr.word != "contract":
        return None
    turned = [state.by(arg, "permute") for arg in instr.args]
    if not any(made is not None and state.by(made.args[0], "index") is not None for made in turned):
        return None
    said = folded(state.defs, instr)
    return None if said is instr else said


def rule_first(state: Rewriter, instr: Instr) -> Instr | None:
    """contract(x, W[H, E, F]) → contract(x, permute(W)[E, H, F])."""
    if instr.word != "contract":
        return None
    letters, out = equation_of(instr)
    for i, arg in enumerate(instr.args):
        if not state.stored(arg) or state.type(arg).rank != 3:
            continue
        letter = experts_of(state, instr, letters[i], letters[1 - i], out, instr.args[1 - i])
        at = letters[i].find(letter) if letter else 0
        if at != 1:
            continue
        args = list(instr.args)
        order = (at, *(d for d in range(3) if d != at))
        args[i] = experts_first(state, arg, order)
        letters[i] = "".join(letters[i][d] for d in order)
        return replace(instr, args=tuple(args), attrs=(("eq", normal_equation(f"{','.join(letters)}->{out}")),))
    return None


def experts_of(state: Rewriter, instr: Instr, mine: str, other: str, out: str, rows: Arg) -> str:
    """The letter of a parameter's axis that runs over experts; '' where nothing says so."""
    apart = [c for c in mine if c in other and c in out]
    if apart:
        return apart[0] if len(apart) == 1 else ""
    summed = [c for c in mine if c in other]
    if len(summed) == 2:
        return _before(state, rows, summed, (other.index(summed[0]), other.index(summed[1])))
    free = [c for c in mine if c not in other]
    return _after(state, instr.results[0], free, (out.index(free[0]), out.index(free[1]))) if len(free) == 2 else ""


Pair = tuple[int, int]
"""Two axes, one of experts and one of features."""


def _told(state: Rewriter, made: Instr, axes: Pair) -> int | None:
    """Which of the two axes an operand of a pointwise function has numbers for, where it has none for the other."""
    for arg in made.args:
        if not isinstance(arg, Ref) or (arg.name not in state.defs and arg.name not in state.graph.defs):
            continue  # what is stored, a bias, tells nothing
        shape = state.type(arg).shape
        lead = made.types[0].rank - len(shape)
        one = [axis < lead or shape[axis - lead] == 1 for axis in axes]
        if one[0] != one[1]:
            return 1 if one[0] else 0
    return None


def _before(state: Rewriter, arg: Arg, names: list[str], axes: Pair) -> str:
    """What gates said before the two axes were summed, or what the product that made them is of."""
    for _ in range(24):
        made = state.by(arg, *POINTS, "contract", "permute")
        if made is None:
            return names[0]
        if made.word == "contract":
            return _of_product(state, made, names, axes)
        if made.word == "permute":
            dims = made.numbers("dims")
            axes = (dims[axes[0]], dims[axes[1]])
        else:
            told = _told(state, made, axes)
            if told is not None:
                return names[told]
        arg = inner_of(state, made)
    return ""


def _of_product(state: Rewriter, made: Instr, names: list[str], axes: Pair) -> str:
    """A parameter that leads with one of the two axes has experts there."""
    parts, out = equation_of(made)
    for arg, part in zip(made.args, parts, strict=True):
        if state.stored(arg) and state.type(arg).rank == 3 and part[0] in (out[axes[0]], out[axes[1]]):
            return names[0 if part[0] == out[axes[0]] else 1]
    return names[0]


def _after(state: Rewriter, name: str, names: list[str], axes: Pair) -> str:
    """What the users of a product do with the two axes that its matrix made."""
    graph = state.graph
    pending, seen = [(name.partition(".p")[0], axes)], set[str]()
    while pending and len(seen) < 64:
        value, at = pending.pop(0)
        for user in graph.users.get(value, ()):
            if not user.results or user.results[0] in seen:
                continue
            seen.add(user.results[0])
            if user.word == "contract":
                told = _by_product(state, user, value, at)
            elif user.word in POINTS:
                told = _told(state, user, at)
            elif user.word == "permute":
                dims = user.numbers("dims")
                pending.append((user.results[0], (dims.index(at[0]), dims.index(at[1]))))
                continue
            else:
                continue
            if told is not None:
                return names[told]
            if user.word in POINTS and user.types[0].rank == state.graph.types[value].rank:
                pending.append((user.results[0], at))
    return ""


def _by_product(state: Rewriter, user: Instr, value: str, axes: Pair) -> int | None:
    """In a product: the axis that stays apart beside a parameter, or that gates are summed over."""
    parts, out = equation_of(user)
    which = next((i for i, arg in enumerate(user.args) if isinstance(arg, Ref) and arg.name == value), None)
    if which is None or not isinstance(user.args[1 - which], Ref):
        return None
    mine, other = parts[which], parts[1 - which]
    root = state.graph.behind(user.args[1 - which], STORED)
    stored = isinstance(root, Ref) and root.name not in state.graph.defs
    shared = [mine[a] in other for a in axes]
    if not stored:
        return (0 if shared[0] else 1) if shared[0] != shared[1] else None
    apart = [mine[a] in other and mine[a] in out for a in axes]
    return (0 if apart[0] else 1) if apart[0] != apart[1] else None
