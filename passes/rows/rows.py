"""Row programs: what one row of an expert's work is, whichever way the layer was spelled.

Loops, sorted groups, gathered weights and dense masks all compute, for token t and its s-th expert e, the same row
expression, for example `mul(dot(mul(silu(dot(x[t], W1[e])), …), W2[e]), w[t, s])`. Lifting finds that expression; only
index operations differ between spellings, so a new spelling is a new index rule, never a new template.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.ir.dims import Dim


@dataclass(frozen=True)
class Space:
    """Which (token, slot) pairs a row axis runs over, and in which order.

    slots   all pairs, t·k + s           sorted  all pairs, ordered by expert (key: the permutation's name)
    loop    the pairs of one expert (key: the loop's anchor)        dense   all (expert, token) pairs, chosen or not
    grid    experts × tokens or seats, as labelled axes (`moec.passes.grid.rows`)

    order: of a loop's pairs, the axes of the mask that selects them, outermost first, or the sort's permutation
    most:  of a loop's pairs, how many of them at most, where these are the first of them; '' for all
    """

    kind: str
    k: int = 0
    key: str = ""
    order: str = ""
    most: str = ""

    @property
    def same_rows(self) -> tuple[str, ...]:
        """What spaces with the same rows in the same order have in common, beside the number of slots."""
        return self.kind, self.key, self.order, self.most


@dataclass(frozen=True)
class Token:
    """x[t, :]."""

    value: str


@dataclass(frozen=True)
class Slot:
    """w[t, s], one number a row."""

    value: str


@dataclass(frozen=True)
class Gate:
    """g[t, e], one number a row, given for every expert; `at`: of that expert alone."""

    value: str
    at: int = -1


@dataclass(frozen=True)
class Expert:
    """Expert e's slice of one stacked [E, …] tensor, or of E separate ones; `order` permutes its axes.

    at      when not −1: the slice of that expert alone
    to      the dtype it is cast to before it is used; '' where it is used as it is stored
    scale   the tensors it is multiplied by: one [E, …], or E; a number for each block of `blocks` (0: all) of its axes
    spread  (axis, n) where each number was repeated n times along an axis
    """

    values: tuple[str, ...]
    order: tuple[int, ...]
    stacked: bool
    at: int = -1
    to: str = ""
    scale: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    spread: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Dot:
    """out[n] = Σ_j row[j] · W[e], contracting axis `axis` of the expert's (ordered) matrix."""

    row: Row
    weight: Expert
    axis: int


@dataclass(frozen=True)
class Slice:
    """row[start:stop:step]."""

    row: Row
    start: int
    stop: int
    step: int


@dataclass(frozen=True)
class Cast:
    """The row in another dtype."""

    row: Row
    dtype: str


@dataclass(frozen=True)
class Apply:
    """A pointwise function of rows and numbers."""

    fn: str
    args: tuple[Row, ...]


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float


@dataclass(frozen=True)
class Served:
    """The row, or zeros where the slot's expert id is `limit` or more (`moec.passes.dispatch.served`)."""

    row: Row
    limit: int


@dataclass(frozen=True)
class Opaque:
    """What an expert's own code makes of its rows; only the code says what."""

    value: str


Row = Opaque | Token | Slot | Gate | Expert | Dot | Slice | Cast | Apply | Number | Served


# What a value of the graph can be lifted to, besides rows:


@dataclass(frozen=True)
class Rows:
    """A tensor of rows: its leading axis or axes (`flat`: [rows], `tk`: [T, k], `et`: [E, T]) run over `space`.

    choice  the value e[T, k] that says which experts the rows go to, once known
    via     the space the rows were computed in, when they have been put back in token order since
    anchor  the loop that computed them an expert at a time, when they have been put together since
    earlier the loops before it, whose rows, put together, it cut again
    """

    space: Space
    row: Row
    layout: str = "flat"
    choice: str = ""
    via: str = ""
    anchor: str = ""
    earlier: tuple[str, ...] = ()

    @property
    def loop(self) -> str:
        """The loop that computes the rows or computed them, an expert at a time; empty where none does."""
        return self.anchor or (self.space.key if self.space.kind == "loop" else "")

    @property
    def lead(self) -> int:
        """How many leading axes run over rows."""
        if self.space.kind == "grid":
            return len(self.layout.split("."))
        return 1 if self.layout == "flat" else 2


@dataclass(frozen=True)
class Body:
    """A value of an expert's own code that is no tensor of rows; `rows`: the number of rows it was made of."""

    space: Space
    rows: Dim
    choice: str = ""


@dataclass(frozen=True)
class Ids:
    """Integers that name, for each row, its token, slot, expert, flat position t·k + s, or place in sorted order."""

    space: Space
    what: str
    choice: str = ""
    layout: str = "flat"


@dataclass(frozen=True)
class Lost:
    """Whether each row's expert id is `limit` or more."""

    space: Space
    layout: str
    choice: str
    limit: int


@dataclass(frozen=True)
class Anchor:
    """The expert of a rolled loop's iteration, over the experts that have rows (by `choice`) or over all."""

    name: str
    choice: str = ""


@dataclass(frozen=True)
class OneHot:
    """Whether slot s of token t chose expert e, as a tensor whose axes are the letters t, s, e in some order.

    Tokens on several axes have the letters of `token_axes`; a number is the flat slots of so many a token.
    """

    choice: str
    axes: tuple[str, ...]
    anchor: str = ""


@dataclass(frozen=True)
class Shifted:
    """The loop's expert plus a number."""

    name: str
    by: int


@dataclass(frozen=True)
class Edge:
    """A number of the loop's expert e: count | start | end of its rows in expert order; before: e − 1's end, e ≥ 1."""

    anchor: str
    choice: str
    what: str


@dataclass(frozen=True)
class Span:
    """The places of the loop's expert's rows in expert order."""

    anchor: str
    choice: str


@dataclass(frozen=True)
class PerExpert:
    """A number per expert made from the choices: counts | hit (whether any) | hits (which are hit); of its rows in
    expert order: offsets (their ends) | starts | bounds (starts, then the number of rows)."""

    what: str
    choice: str
    bins: int | None = None  # how many experts were counted, where it could be fewer than there are


@dataclass(frozen=True)
class Masked:
    """w[t, s] where slot s chose the loop's expert, 0 elsewhere; `summed` over s."""

    value: str
    choice: str
    anchor: str
    summed: bool = False


@dataclass(frozen=True)
class Gates:
    """g[…, e], a number a token and expert, with the experts' axis put first: [E, …]."""

    value: str


@dataclass(frozen=True)
class Column:
    """g[…, e] of the loop's expert: its gate for every token; `key`: the loop."""

    value: str
    key: str


@dataclass(frozen=True)
class Idle:
    """Whether the loop's expert has no rows (or, not `idle`, has some); by `choice`, where one says so."""

    anchor: str
    idle: bool = True
    choice: str = ""


@dataclass(frozen=True)
class Side:
    """Whether the loop's expert is `limit` or more (or, not `above`, less)."""

    anchor: str
    limit: int
    above: bool


@dataclass(frozen=True)
class Part:
    """The experts that a loop runs: those from `limit` on, or (not `above`) those before."""

    limit: int
    above: bool


@dataclass(frozen=True)
class Special:
    """What another table of rules lifts values to (`moec.passes.rows.hot`)."""


Lifted = (
    Rows
    | Body
    | Ids
    | Lost
    | Anchor
    | Shifted
    | Edge
    | Span
    | OneHot
    | PerExpert
    | Masked
    | Gates
    | Column
    | Idle
    | Side
    | Expert
    | Special
)


def strip(row: Row) -> Row:
    """The row without outer casts."""
    while isinstance(row, Cast):
        row = row.row
    return row


def text(row: Row) -> str:
    """The row expression for people."""
    match row:
        case Opaque(value):
            return f"%{value}[row]"
        case Token(value):
            return f"%{value}[t]"
        case Slot(value):
            return f"%{value}[t, s]"
        case Gate(value):
            return f"%{value}[t, e]"
        case Expert(values):
            return f"%{values[0]}[e]"
        case Dot(inner, weight):
            return f"dot({text(inner)}, {text(weight)})"
        case Slice(inner, start, stop, step):
            return f"{text(inner)}[{start}:{stop}:{step}]"
        case Cast(inner, dtype):
            return f"{dtype}({text(inner)})"
        case Apply(fn, args):
            return f"{fn}({', '.join(map(text, args))})"
        case Number(value):
            return repr(value)
        case Served(inner, limit):
            return f"served({text(inner)}, {limit})"


def compatible(a: Space, b: Space) -> bool:
    """Whether two values have the same rows in the same order."""
    return a.same_rows == b.same_rows and (a.k == b.k or 0 in (a.k, b.k))


def merged(a: Rows | None, b: Rows) -> Rows:
    """The rows of both, which are compatible: each knows something of where they come from."""
    if a is None:
        return b
    earlier = tuple(dict.fromkeys((*a.earlier, *b.earlier)))
    space = replace(a.space, k=a.space.k or b.space.k)
    return replace(a, choice=a.choice or b.choice, space=space, anchor=a.anchor or b.anchor, earlier=earlier)
