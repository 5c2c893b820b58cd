"""Experts chosen by a mask or a threshold: any number of them a token, each at most once.

for e: rows = where(g[:, e] > t); y[rows] += g[rows, e]·expert_e(x[rows])
    →   experts(x, g[T, E], where(g > t, arange(E), −1)): E slots a token, of which no kernel runs those with −1
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from moec.ir.dtypes import DTYPES
from moec.ir.graph import Arg, Graph, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.rows.body import BodyMatch
from moec.passes.rows.hot import sinks
from moec.passes.rows.lift import FLOATS, Lift, Lifter, same
from moec.passes.rows.pairs import Writer
from moec.passes.rows.rows import Anchor, Column, Gates, OneHot
from moec.passes.rows.say_experts import say_experts
from moec.passes.rows.token_axes import MOST, token_letters

_COMPARISONS = frozenset({"gt", "ge", "lt", "le", "ne", "eq"})


@dataclass(frozen=True)
class Table:
    """Who chooses whom, […, E]: the mask `value`, where `value` compares so with a number, or not (`invert`)."""

    value: str
    word: str = ""
    limit: float = 0.0

    @property
    def name(self) -> str:
        """The choice's name while it is matched."""
        return f"{self.value}#{self.word}{self.limit if self.word else ''}"

    def mask(self, out: Writer) -> str:
        """The mask, made where it is a comparison or the opposite of one."""
        if not self.word:
            return self.value
        operands: tuple[Arg, ...] = (Ref(self.value),) if self.word == "invert" else (Ref(self.value), self.limit)
        return out.emit(self.word, operands, Type("bool", out.type(self.value).shape))


def column(lifter: Lifter, held: Gates, item: Anchor) -> Lift:
    """table[:, e]: numbers of the loop's expert, or the mask of its rows."""
    kind = lifter.graph.types[held.value]
    if kind.dtype in FLOATS:
        return Column(held.value, item.name)
    if kind.rank < 2 or kind.dtype != "bool":
        return NoMatch(f"a column of {kind} taken at the loop's expert", held.value)
    return _mask(lifter, Table(held.value), item.name)


def compared(lifter: Lifter, word: str, left: Arg, right: Arg) -> OneHot | None:
    """g[:, e] > t: the mask of the expert's rows."""
    held = lifter.lift(left)
    number = isinstance(right, (int, float)) and not isinstance(right, bool)
    if not isinstance(held, Column) or word not in _COMPARISONS or not number:
        return None
    if not 2 <= lifter.graph.types[held.value].rank <= MOST + 1:
        return None
    assert isinstance(right, (int, float))
    return _mask(lifter, Table(held.value, word, float(right)), held.key)


def _mask(lifter: Lifter, table: Table, anchor: str) -> OneHot:
    lifter.tables[table.name] = table
    return OneHot(table.name, table_axes(lifter, table.name), anchor)


def table_axes(lifter: Lifter, choice: str) -> tuple[str, ...]:
    """The axes of the tokens of a table of `lifter.tables`; () where `choice` is none."""
    table = lifter.tables.get(choice)
    return token_letters(lifter.graph.types[table.value].rank - 1) if isinstance(table, Table) else ()


def table_choice(
    lifter: Lifter, root: Instr, choice: str, weight: str, by_expert: bool, experts: int
) -> tuple[tuple[Instr, ...], str, str] | NoMatch:
    """Instructions, w[…, E] and e[T, E] of a choice that is a table of `lifter.tables`."""
    table = lifter.tables[choice]
    assert isinstance(table, Table)
    kind = lifter.graph.types[table.value]
    if kind.shape[-1] != experts or (weight and not by_expert):
        return NoMatch(f"choices are {kind} for {experts} experts, weighted by %{weight}", table.value)
    given = lifter.graph.types[weight] if weight else kind
    if given.rank != kind.rank or not all(same(a, b) for a, b in zip(given.shape, kind.shape, strict=True)):
        return NoMatch(f"gates are {given} for choices {kind}", weight)
    out = Writer(lifter.graph, root)
    pairs = (sympy.Mul(*kind.shape[:-1]), kind.shape[-1])
    chosen = out.emit("experts_where", (Ref(out.reshape(table.mask(out), pairs)),), Type("i64", pairs))
    return tuple(out.instrs), weight, chosen


def support(graph: Graph, gates: str) -> Table | None:
    """Where gates may differ from zero, and may have a gradient.

    relu(u), where(m, u, 0), m·u, softmax(where(m, u, −∞)), and what follows.
    """
    made = graph.defs.get(gates)
    if made is None:
        return None
    shape = graph.types[gates].shape
    if made.word == "relu":
        return Table(gates, "gt", 0.0)
    if made.word == "softmax":
        return _unsunk(graph, made.args[0])
    if made.word == "where" and graph.is_zero(made.args[2]) and isinstance(made.args[0], Ref):
        mask = graph.types[made.args[0].name]
        return Table(made.args[0].name) if mask.dtype == "bool" and mask.shape == shape else None
    factors = made.args if made.word == "mul" else made.args[:1] if made.word in ("div", "cast", "same") else ()
    for arg in factors:
        source = graph.behind(arg, ("cast", "same")) if isinstance(arg, Ref) else arg
        if not isinstance(source, Ref) or graph.types[source.name].shape != shape:
            continue
        if graph.types[source.name].dtype == "bool":
            return Table(source.name)
        found = support(graph, source.name)
        if found is not None:
            return found
    return None


def _unsunk(graph: Graph, scores: Arg) -> Table | None:
    """Where scores are not −∞: where(m, u, −∞), where(m, −∞, u), and those times or over a positive number."""
    found = graph.behind(scores, ("cast", "same"))
    made = graph.defs.get(found.name) if isinstance(found, Ref) else None
    if made is None or not isinstance(found, Ref):
        return None
    if made.word in ("mul", "div"):
        number = made.args[1]
        positive = isinstance(number, int | float) and not isinstance(number, bool) and 1e-3 <= number <= 1e3
        return _unsunk(graph, made.args[0]) if positive else None
    if made.word == "masked_fill":
        mask, low, inverted = made.args[1], made.args[2], True
    elif made.word == "where":
        inverted = _sinks(graph, made.args[1])
        mask, low = made.args[0], made.args[1 if inverted else 2]
    else:
        return None
    if not isinstance(mask, Ref) or not _sinks(graph, low):
        return None
    kind = graph.types[mask.name]
    alike = kind.dtype == "bool" and kind.shape == graph.types[found.name].shape
    return Table(mask.name, "invert" if inverted else "") if alike else None


def _sinks(graph: Graph, arg: Arg) -> bool:
    """Whether a softmax gives 0 to a score filled in."""
    value = _constant(graph, arg)
    return not isinstance(value, Ref) and sinks(value, graph.types[arg.name].dtype if isinstance(arg, Ref) else "f32")


def _constant(graph: Graph, arg: Arg) -> object:
    """The number that a value is everywhere, else the value."""
    made = graph.defs.get(arg.name) if isinstance(arg, Ref) else None
    return made.attr("value") if made is not None and made.word == "full" else arg


def say_support(lifter: Lifter, root: Instr, body: BodyMatch, table: Table) -> tuple[Instr, ...] | NoMatch:
    """The instructions that replace a sum of every expert's rows times gates that `table` says are zero elsewhere."""
    graph = lifter.graph
    to, x, gates = root.types[0], graph.types[body.token], graph.types[body.weight]
    alike = (
        to.shape == (*x.shape[:-1], body.out)
        and gates.shape[:-1] == x.shape[:-1]
        and gates.shape[-1] == body.num_experts
    )
    if not alike or x.rank < 2 or x.dtype not in DTYPES or to.dtype not in DTYPES:
        return NoMatch(f"tokens are {x}, gates {gates}, their sum is {to}", root.results[0], 7)
    out = Writer(graph, root)
    mask = table.mask(out)
    # Gates that were divided by their sum are NaN where that is 0, and so is what eager makes of them.
    other = out.emit("ne", (Ref(body.weight), 0.0), Type("bool", gates.shape))
    mask = out.emit("bitwise_or", (Ref(mask), Ref(other)), Type("bool", gates.shape))
    pairs = (sympy.Mul(*x.shape[:-1]), gates.shape[-1])
    chosen = out.emit("experts_where", (Ref(out.reshape(mask, pairs)),), Type("i64", pairs))
    return say_experts(out, body, out.reshape(body.weight, pairs), chosen, "dense")
