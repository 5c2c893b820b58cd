"""Rows on a grid: every expert on every token, or on every one of its seats, as batched products or one by one.

Their axes are labelled as in `moec.passes.rows.hot`: `e` expert, `c` seat, the letters of tokens' axes, `1`. Pieces for
one expert each, computed apart and stacked, are the same rows: their programs differ in the expert alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from moec.ir.graph import Arg, Dim, Instr, Ref
from moec.ir.match import NoMatch, nearest
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.hot import Hot, Seats, flat, letters_of, relabel
from moec.passes.rows.lift import Lift, Lifter, same
from moec.passes.rows.rows import Apply, Cast, Dot, Expert, Gate, Row, Rows, Slice, Space, Token


@dataclass(frozen=True)
class Grid(Space):
    """A space of labelled axes. key: the dispatch mask that filled the seats, '' when rows are all the tokens.

    k  when not 0: rows of expert k − 1 alone      sizes  of the labels' letters
    """

    sizes: tuple[tuple[str, Dim], ...] = ()


def labels(rows: Rows) -> tuple[str, ...]:
    """The labels of the leading axes."""
    return tuple(rows.layout.split("."))


def on_grid(value: Lift) -> bool:
    """Whether a value is rows on a grid."""
    return isinstance(value, Rows) and isinstance(value.space, Grid)


def _sizes(rows: Rows) -> dict[str, Dim]:
    assert isinstance(rows.space, Grid)
    return dict(rows.space.sizes)


def _off_grid(instr: Instr, *held: Lift) -> NoMatch:
    """Why the operands are no rows on a grid: what the first that nobody understands says, so that a reader sees it."""
    misses = [each for each in held if isinstance(each, NoMatch)]
    return nearest(misses or [NoMatch("not rows on a grid", instr.results[0])])


def rule_reshape(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A reshape that joins or splits row axes and keeps the features."""
    rows, to = lifter.lift(instr.args[0]), instr.types[0]
    if not isinstance(rows, Rows) or not on_grid(rows):
        return _off_grid(instr, rows)
    feature = lifter.type(instr.args[0]).shape[-1]
    axes = relabel(labels(rows), _sizes(rows), to.shape[:-1]) if to.shape[-1] == feature else None
    if axes is None:
        return NoMatch(f"reshape {lifter.type(instr.args[0])} → {to} mixes rows", instr.results[0], 2)
    return replace(rows, layout=".".join(axes))


def rule_permute(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Another order of the row axes."""
    rows, dims = lifter.lift(instr.args[0]), instr.attr("dims")
    if not isinstance(rows, Rows) or not on_grid(rows) or not isinstance(dims, tuple):
        return _off_grid(instr, rows)
    order = [int(str(d)) for d in dims]
    if order[-1] != rows.lead:
        return NoMatch("a permute moves the features of rows", instr.results[0], 2)
    return replace(rows, layout=".".join(labels(rows)[d] for d in order[:-1]))


def rule_slice(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """One expert's rows."""
    rows = lifter.lift(instr.args[0])
    if not isinstance(rows, Rows) or not on_grid(rows) or not isinstance(rows.space, Grid):
        return _off_grid(instr, rows)
    dim, start, stop, step = (int(str(instr.attr(n))) for n in ("dim", "start", "stop", "step"))
    axes = labels(rows)
    if dim == rows.lead:
        return replace(rows, row=Slice(rows.row, start, stop, step))
    if axes[dim] != "e" or stop != start + 1 or rows.space.k:
        return NoMatch(f"the slice {start}:{stop} along row axis {dim}", instr.results[0], 2)
    axes = (*axes[:dim], "1", *axes[dim + 1 :])
    return replace(rows, layout=".".join(axes), space=replace(rows.space, k=start + 1))


def parameter(lifter: Lifter, arg: Arg, rank: int) -> Expert | NoMatch:
    """One expert's own matrix or vector: a tensor, or a slice of a stacked one."""
    kind = lifter.type(arg)
    if not isinstance(arg, Ref) or kind.rank != rank:
        return NoMatch(f"{kind} is not one expert's parameter", str(arg))
    order = tuple(range(rank))
    made = lifter.instr(arg)
    if made is not None and made.word == "permute" and rank == 2:
        order, made = (1, 0), lifter.instr(made.args[0])
    if made is not None and made.word == "reshape":
        made = lifter.instr(made.args[0])
    if made is not None and made.word == "slice" and made.attr("dim") == 0 and isinstance(made.args[0], Ref):
        start, stop = int(str(made.attr("start"))), int(str(made.attr("stop")))
        if stop == start + 1 and lifter.type(made.args[0]).rank == rank + 1:
            return Expert((made.args[0].name,), order, True, start)
    return Expert((arg.name,), tuple(range(rank)), False)


def rule_pointwise(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Rows with an expert's bias, or with a gate a token and expert."""
    if len(instr.args) != 2 or instr.word not in ("add", "mul"):
        return NoMatch(f"`{instr.word}` of rows on a grid", instr.results[0])
    for arg, other in (instr.args, instr.args[::-1]):
        rows = lifter.lift(arg)
        kind, to = lifter.type(arg), instr.types[0]
        if not isinstance(rows, Rows) or not on_grid(rows) or kind.rank != to.rank or kind.shape[-1:] != to.shape[-1:]:
            continue
        factor = _gate(lifter, rows, other) if instr.word == "mul" else _bias(lifter, rows, other)
        return factor if isinstance(factor, NoMatch) else replace(rows, row=Apply(instr.word, (rows.row, factor)))
    return _off_grid(instr, *(lifter.lift(arg) for arg in instr.args if isinstance(arg, Ref)))


def _bias(lifter: Lifter, rows: Rows, arg: Arg) -> Expert | NoMatch:
    """b[F] of one expert, or b[E, F] with an axis of size 1 for each other row axis."""
    axes, kind = labels(rows), lifter.type(arg)
    if "e" not in flat(axes):
        return parameter(lifter, arg, 1)
    width = kind.shape[-1] if kind.rank else sympy.S.One
    aligned = ("1",) * (rows.lead + 1 - kind.rank) + axes[rows.lead + 1 - kind.rank :]
    wanted = tuple(a if a == "e" else "1" for a in aligned)
    real = tuple(
        "1" if d == 1 else a for d, a in zip(((1,) * (rows.lead + 1 - kind.rank), *kind.shape), aligned, strict=False)
    )
    arg = lifter.graph.behind(arg, ("reshape",))
    base = lifter.type(arg)
    if not isinstance(arg, Ref) or "e" not in wanted or base.rank not in (2, 3) or base.shape[-1] != width:
        return NoMatch(f"{kind} is not an experts' bias", str(arg), 2)
    count = _sizes(rows).get("e")
    if len(real) > len(axes) + 1 or base.shape[0] != count or sympy.prod(base.shape) != sympy.prod((count, width)):
        return NoMatch(f"{kind} is not an experts' bias", str(arg), 2)
    position = [i for i, d in enumerate(kind.shape[:-1]) if d != 1]
    offset = rows.lead + 1 - kind.rank
    if count != 1 and [axes[p + offset] for p in position] != ["e"]:
        return NoMatch(f"{kind} is not an experts' bias", str(arg), 2)
    return Expert((arg.name,), (0,), True)


def _gate(lifter: Lifter, rows: Rows, arg: Arg) -> Gate | NoMatch:
    """g[t, e, 1] for rows of all experts; g[t, e:e+1] for rows of one."""
    axes, kind = labels(rows), lifter.type(arg)
    if kind.rank != rows.lead + 1 or kind.shape[-1] != 1:
        return NoMatch(f"rows times {kind}, expected one number a row", str(arg), 2)
    made = lifter.instr(arg)
    if "e" not in axes:
        column = lifter.masks.lift(arg) if lifter.masks is not None else None
        if isinstance(column, Hot) and column.at >= 0:
            return _column(lifter, column, kind.dtype)
    while made is not None and made.word in ("reshape", "same") and lifter.type(made.args[0]).rank:
        arg = made.args[0]
        made = lifter.instr(arg)
    if "e" not in axes:
        if made is None or made.word != "slice" or not isinstance(made.args[0], Ref):
            return NoMatch("rows of one expert are not weighted by its column of gates", str(arg), 2)
        whole, start, stop = made.args[0], int(str(made.attr("start"))), int(str(made.attr("stop")))
        if made.attr("dim") != lifter.type(whole).rank - 1 or stop != start + 1:
            return NoMatch("rows of one expert are not weighted by its column of gates", str(arg), 2)
        return (
            Gate(whole.name, start) if _tokens(lifter, rows, whole) else NoMatch("gates of other tokens", str(arg), 2)
        )
    order = axes
    if made is not None and made.word == "permute" and isinstance(made.args[0], Ref):
        dims = made.numbers("dims")
        stored = [""] * len(dims)
        for label, d in zip(order, dims, strict=False):
            stored[d] = label
        order, arg = tuple(stored), made.args[0]
    if not isinstance(arg, Ref) or lifter.type(arg).rank != len(order) or order[-1] != "e":
        return NoMatch("gates are not a number a token and expert", str(arg), 2)
    return Gate(arg.name) if list(order[:-1]) == sorted(order[:-1]) else NoMatch("gates of other tokens", str(arg), 2)


def _column(lifter: Lifter, column: Hot, dtype: str) -> Gate:
    """A column of gates by a name that the columns of all experts share."""
    assert lifter.masks is not None
    whole = replace(column, at=-1, axes=())
    name = f"{dtype} gates {whole}"
    lifter.masks.memo[name] = whole
    return Gate(name, column.at)


def _tokens(lifter: Lifter, rows: Rows, gates: Ref) -> bool:
    """Whether the gates' leading axes are those of the rows."""
    kind, sizes = lifter.type(gates), _sizes(rows)
    return all(
        len(label) == 1 and same(sizes.get(label, sympy.S.One), dim)
        for label, dim in zip(labels(rows), kind.shape[:-1], strict=False)
    )


def rule_expand(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """x[1, T, H] → [E, T, H]: every token for every expert."""
    made, to = lifter.instr(instr.args[0]), instr.types[0]
    if made is None or made.word != "reshape" or not isinstance(made.args[0], Ref) or to.rank < 3:
        return NoMatch("not every token for every expert", instr.results[0])
    x = lifter.type(made.args[0])
    if (
        x.shape != to.shape[1:]
        or lifter.type(instr.args[0]).shape[0] != 1
        or not isinstance(lifter.lift(made.args[0]), NoMatch)
    ):
        return NoMatch("not every token for every expert", instr.results[0])
    tokens = letters_of(x.rank - 1)
    sizes = (*zip(tokens, x.shape, strict=False), ("e", to.shape[0]))
    return Rows(Grid("grid", 0, "", sizes=sizes), Token(made.args[0].name), ".".join(("e", *tokens)))


def rule_contract(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Tokens sent to seats; rows times their expert's matrix; every expert's matrix on every token."""
    (left, right), out = equation_of(instr)
    sent = _sent(lifter, instr, left, right, out)
    if sent is not None:
        return sent
    for x, w, row, mat in ((*instr.args, left, right), (*instr.args[::-1], right, left)):
        rows = lifter.lift(x)
        if isinstance(rows, Rows) and on_grid(rows) and not _handed_out(lifter, x, rows):
            return _times(lifter, instr, rows, w, (row, mat, out))
    for x, w, row, mat in ((*instr.args, left, right), (*instr.args[::-1], right, left)):
        rows = lifter.lift(x)
        tokens = isinstance(rows, NoMatch) or (isinstance(rows, Rows) and _handed_out(lifter, x, rows))
        if tokens and isinstance(lifter.lift(w), NoMatch):
            fresh = _fresh(lifter, instr, x, w, (row, mat, out))
            if not isinstance(fresh, NoMatch):
                return fresh
    return NoMatch(f"contraction {instr.attr('eq')} is not of tokens and experts", instr.results[0])


def _handed_out(lifter: Lifter, x: Arg, rows: Rows) -> bool:
    """Whether more products read a value than one expert has of its own hidden row: it is what tokens bring along."""
    if not isinstance(x, Ref) or "e" in flat(labels(rows)):
        return False
    users = [user for user in lifter.graph.users.get(x.name, ()) if user.word == "contract"]
    return len({tuple(arg for arg in user.args if arg != x) for user in users}) > 2


def seats_of(lifter: Lifter, arg: Arg) -> Seats | None:
    """The table of seats that a value is, when it is one."""
    masks = lifter.masks
    if masks is None or not isinstance(arg, Ref):
        return None
    kind, made = lifter.type(arg), lifter.instr(arg)
    if kind.rank < 3 and not (made is not None and made.word in ("reshape", "permute")):
        return None
    found = masks.lift(arg)
    # A table that lost an axis on its way here is none: what its axes mean is not known any more.
    return found if isinstance(found, Seats) and len(found.axes) == kind.rank else None


def _sent(lifter: Lifter, instr: Instr, left: str, right: str, out: str) -> Lift | None:
    """einsum("tec,th->ech", dispatch, x): one token a seat."""
    for mask, x, at, of in ((*instr.args, left, right), (*instr.args[::-1], right, left)):
        seats = seats_of(lifter, mask)
        if seats is None or not isinstance(x, Ref) or not isinstance(mask, Ref) or of[-1] in at:
            continue
        if not seats.unit:
            return NoMatch("tokens are weighted when they are sent to their seats", instr.results[0], 3)
        label = dict(zip(at, seats.axes, strict=True))
        mine = tuple(label.get(c, "?") for c in of[:-1])
        if "?" in mine or out[-1] != of[-1] or flat(mine) != "".join(sorted(flat(mine))):
            return NoMatch(f"contraction {instr.attr('eq')} is not one token a seat", instr.results[0], 3)
        axes = tuple(label[c] for c in out[:-1])
        sizes = dict(seats.sizes) | {
            label[c]: d for c, d in zip(at, lifter.type(mask).shape, strict=True) if len(label[c]) == 1
        }
        return Rows(Grid("grid", 0, mask.name, sizes=tuple(sizes.items())), Token(x.name), ".".join(axes))
    return None


def _times(lifter: Lifter, instr: Instr, rows: Rows, w: Arg, letters: tuple[str, str, str]) -> Lift:
    """Rows times a matrix of their own expert."""
    row, mat, out = letters
    axes, name = labels(rows), instr.results[0]
    if not isinstance(w, Ref) or len(row) != len(axes) + 1:
        return NoMatch(f"contraction {instr.attr('eq')} is not rows times matrices", name, 2)
    label = dict(zip(row, axes, strict=False))
    batch = [c for c in mat if c in row[:-1]]
    if "e" in axes and [label[c] for c in batch] == ["e"] and len(mat) == 3:
        order = tuple(i for i in range(3) if mat[i] != batch[0])
        if mat.index(batch[0]) != 0:
            return NoMatch("the expert axis of a parameter is not its first", name, 2)
        weight: Expert | NoMatch = Expert((w.name,), tuple(i - 1 for i in order), True)
        mat = mat.replace(batch[0], "")
    elif "e" not in flat(axes) and not batch and len(mat) == 2:
        weight = parameter(lifter, w, 2)
    else:
        return NoMatch(f"contraction {instr.attr('eq')} is not each expert's rows times its matrix", name, 2)
    if isinstance(weight, NoMatch):
        return weight
    if _dots(rows.row) > 3:
        return NoMatch("experts of more than four matrices, one after another", name, 2)
    if row[-1] not in mat or out[-1] not in mat or row[-1] in out or len(out) != len(row):
        return NoMatch(f"contraction {instr.attr('eq')} is not each row times a matrix", name, 2)
    layout = ".".join(label[c] for c in out[:-1])
    return replace(rows, row=Dot(rows.row, weight, mat.index(row[-1])), layout=layout)


def _dots(row: Row) -> int:
    """How many products a row's longest path has."""
    match row:
        case Dot(inner):
            return 1 + _dots(inner)
        case Apply(_, args):
            return max(map(_dots, args), default=0)
        case _:
            return _dots(row.row) if isinstance(row, Slice | Cast) else 0


def _fresh(lifter: Lifter, instr: Instr, x: Arg, w: Arg, letters: tuple[str, str, str]) -> Lift:
    """Plain tokens x times one expert's matrix, or every expert's."""
    row, mat, out = letters
    name, kind = instr.results[0], lifter.type(x)
    if not isinstance(x, Ref) or not isinstance(w, Ref) or not 2 <= kind.rank <= 3 or lifter.instr(w) is instr:
        return NoMatch("not tokens and an expert's matrix", name)
    shared = [c for c in row if c in mat]
    if shared != [row[-1]] or out[-1] not in mat:
        return NoMatch("not tokens and an expert's matrix", name)
    tokens = letters_of(kind.rank - 1)
    label = dict(zip(row[:-1], tokens, strict=True))
    sizes = dict(zip(tokens, kind.shape, strict=False))
    if len(mat) == 3 and mat[0] in out[:-1] and mat[0] not in row:
        label[mat[0]] = "e"
        sizes["e"] = lifter.type(w).shape[0]
        weight: Expert | NoMatch = Expert((w.name,), (0, 1), True)
        mat = mat[1:]
    elif len(mat) == 2:
        weight = parameter(lifter, w, 2)
    else:
        return NoMatch("not tokens and an expert's matrix", name)
    if isinstance(weight, NoMatch) or any(c not in label for c in out[:-1]) or len(out) != len(label) + 1:
        return NoMatch("not tokens and an expert's matrix", name)
    row_of: Row = Dot(Token(x.name), weight, mat.index(row[-1]))
    return Rows(Grid("grid", 0, "", sizes=tuple(sizes.items())), row_of, ".".join(label[c] for c in out[:-1]))
