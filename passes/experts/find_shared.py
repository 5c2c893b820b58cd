"""Recognise a shared expert: a dense expert on the same tokens, added to what the routed ones give.

It stays beside the routed path, where the compiler of the rest of the graph runs it as plain matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.ir.graph import Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.dispatch.row_rules import RULES
from moec.passes.lowering.lower import SITES
from moec.passes.rows.body import BodyMatch, match_body
from moec.passes.rows.lift import Lift, Lifter
from moec.passes.rows.rows import Apply, Dot, Expert, Row, Rows, Space, Token, strip
from moec.pipeline import Facts, Outcome


@dataclass(frozen=True)
class FindShared:
    """Describe each site's shared expert in its instruction."""

    name: str = "find-shared"

    def run(self, graph: Graph, facts: Facts) -> Outcome:
        """The same graph with `shared` attributes."""
        found: dict[str, Instr] = {}
        for site in graph.instrs:
            if site.word in SITES:
                shared = shared_of(graph, site)
                if shared is not None:
                    attrs = (*site.attrs, ("shared", shared[0].spec.activation), ("shared_width", str(shared[0].width)))
                    found[site.results[0]] = replace(site, attrs=(*attrs, ("shared_gated", shared[1])))
        instrs = (found.get(i.results[0], i) if i.results else i for i in graph.instrs)
        return Outcome(graph.with_instrs(instrs), len(found))


def shared_of(graph: Graph, site: Instr) -> tuple[BodyMatch, bool] | None:
    """The shared expert that is added to the site's result, and whether a sigmoid gates it."""
    value = site.results[0]
    while True:
        users = graph.users.get(value, ())
        if len(users) != 1 or users[0].word not in ("reshape", "cast", "same", "add"):
            return None
        if users[0].word == "add":
            break
        value = users[0].results[0]
    others = [name for name in users[0].uses if name != value]
    if len(others) != 1:
        return None
    return match_shared(graph, site.uses[0], others[0])


def match_shared(graph: Graph, x: str, name: str) -> tuple[BodyMatch, bool] | None:
    """Whether `name` is one expert's function of every token of `x`."""
    lifter = Lifter(graph, RULES, memo=_dense_leaves(graph, x))
    rows = lifter.lift(Ref(name))
    if not isinstance(rows, Rows):
        return None
    gate, row = _gate(rows.row)
    body = match_body(graph, row)
    return None if isinstance(body, NoMatch) else (body, gate)


def _gate(row: Row) -> tuple[bool, Row]:
    """sigmoid(x · w) · r → r."""
    inner = strip(row)
    if isinstance(inner, Apply) and inner.fn == "mul":
        for factor, rest in (inner.args, inner.args[::-1]):
            held = strip(factor)
            if isinstance(held, Apply) and held.fn == "sigmoid" and isinstance(strip(held.args[0]), Dot):
                return True, rest
    return False, row


def _dense_leaves(graph: Graph, x: str) -> dict[str, Lift]:
    """Every token is a row of the one expert there is; inputs of rank 1 and 2 are its parameters."""
    memo: dict[str, Lift] = {}
    for name, kind in graph.inputs:
        if kind.rank in (1, 2):
            memo[name] = Expert((name,), tuple(range(kind.rank)), False)
    space = Space("slots", 1)
    memo[x] = Rows(space, Token(x))
    made = graph.defs.get(x)
    if made is not None and made.word == "reshape" and graph.types[made.uses[0]].rank == 3:
        memo[made.uses[0]] = Rows(space, Token(x), "tk")
    return memo
