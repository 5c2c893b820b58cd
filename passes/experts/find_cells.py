"""Find experts by the letters of axes: dense and then gathered, gathered, batched, one a token."""

from __future__ import annotations

from moec.ir.graph import Graph, Instr, Ref
from moec.ir.match import NoMatch, nearest
from moec.passes.cells.sums import LAST, SUMS, Total, choice_letters, on_grid, pairs_of, summed, unsummed
from moec.passes.dispatch.combine import Combined
from moec.passes.experts.found import Found, idle_is_zero, obstacle, say_sum
from moec.passes.experts.seated import routing_of, say
from moec.passes.grid.rows import Grid
from moec.passes.rows.body import BodyMatch, match_body
from moec.passes.rows.lift import Lifter
from moec.passes.rows.pairs import Writer
from moec.passes.rows.rows import Rows, Space
from moec.pipeline import Facts


def find_summed(lifter: Lifter, instr: Instr, facts: Facts) -> Found | NoMatch:
    """The experts whose rows `instr` sums, over slots or over all experts."""
    cells = lifter.cells
    if cells is None or instr.word not in SUMS:
        return NoMatch("not a sum over experts' rows")
    total = summed(cells, instr)
    return total if isinstance(total, NoMatch) else _say(lifter, instr, total, facts)


def find_unsummed(lifter: Lifter, instr: Instr, facts: Facts) -> Found | NoMatch:
    """The experts, one a token, whose rows `instr` makes last."""
    cells = lifter.cells
    if cells is None or instr.word not in LAST:
        return NoMatch("not the rows of one expert a token")
    total = unsummed(cells, instr)
    if isinstance(total, NoMatch):
        return total
    found = _say(lifter, instr, total, facts)
    if isinstance(found, NoMatch) and found.depth < 6:  # an expert that goes on in a way that no rule knows
        users = lifter.graph.users.get(instr.results[0], ())
        ends = [cells.lift(Ref(user.results[0])) for user in users if user.results]
        return nearest([end.deeper(2) for end in ends if isinstance(end, NoMatch)] or [found])
    return found


def _say(lifter: Lifter, instr: Instr, total: Total, facts: Facts) -> Found | NoMatch:
    body = match_body(lifter.graph, total.cells.row)
    if isinstance(body, NoMatch):
        return body.deeper(2)
    held = (
        "each token sums its experts' rows" if total.slots else "each token has one expert's row",
        f"an expert is matrices and pointwise functions: E={body.num_experts}, φ={body.spec.activation}",
        "every expert is visited",
    )
    if not body.num_experts.is_Integer or not body.width.is_Integer:
        return NoMatch(f"{body.num_experts} experts of width {body.width}", instr.results[0], 6).after(*held)
    said = obstacle(lifter.graph, facts, body)
    if said is not None:
        return said.after(*held)
    found = _dense(lifter, instr, total, body) if total.slots == "e" else _chosen(lifter.graph, instr, total, body)
    return found.after(*held) if isinstance(found, NoMatch) else found


def _dense(lifter: Lifter, instr: Instr, total: Total, body: BodyMatch) -> Found | NoMatch:
    """Every expert on every token, with gates that are a mask of choices times numbers."""
    rows = on_grid(total)
    assert isinstance(rows.space, Grid)
    if body.cast or body.spec.codes:
        return NoMatch("matrices of a batch of experts are cast or scaled before they are used", body.weight, 6)
    if not idle_is_zero(body):
        return NoMatch("an expert maps a zero row to something else than zero", body.weight, 6)
    routing = routing_of(lifter, rows, None, body)
    if isinstance(routing, NoMatch):
        return routing.deeper(6)
    said = say(lifter, instr, rows, body, routing)
    return said if isinstance(said, NoMatch) else Found(instr.results[0], said)


def _chosen(graph: Graph, instr: Instr, total: Total, body: BodyMatch) -> Found | NoMatch:
    """The rows of chosen experts, with a number a row or 1."""
    out, cells = Writer(graph, instr), total.cells
    choice = pairs_of(out, total, cells.choice, choice_letters(graph, cells), body.token)
    weights = body.weight
    if weights:
        letters = dict(cells.gates)[weights]
        if not body.by_expert:
            weights = pairs_of(out, total, weights, letters, body.token)
        else:
            return NoMatch("gates of every expert weight rows of which some are gathered", weights, 6)
    rows = Rows(Space("slots", 0), cells.row, "tk")
    made = Combined(instr.results[0], rows, "gathered")
    return say_sum(graph, instr, made, body, tuple(out.instrs), weights, choice)
