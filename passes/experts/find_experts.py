"""Find every group of experts, however its dispatch is spelled, and say it in one word.

%y = reduce_sum(…sort, gather, grouped, silu, grouped, un-sort…)   →   %y = experts(%x, %w, %e, (%up, %down)) spec=…
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moec.ir import expr as ex
from moec.ir.graph import Graph, Instr, Ref, Type, sweep
from moec.ir.match import NoMatch, nearest
from moec.passes.capacity.rules import hot_lifter
from moec.passes.cells.rules import cell_lifter
from moec.passes.cells.sums import LAST
from moec.passes.dispatch.combine import COMBINING, Combined, combined
from moec.passes.dispatch.every import added_rows
from moec.passes.dispatch.firsts import First, first_choice
from moec.passes.dispatch.kept import kept_choice, made_shape
from moec.passes.dispatch.partial import part_of, some_experts
from moec.passes.dispatch.rereads import body_as_before
from moec.passes.dispatch.row_rules import RULES
from moec.passes.dispatch.runs import full_run
from moec.passes.dispatch.served import meets_an_expert, unguarded
from moec.passes.dispatch.skips import asked_of_others, only_idle_skipped
from moec.passes.dispatch.thresholds import say_support, support, table_choice
from moec.passes.dispatch.weighed import weighed_choice
from moec.passes.experts.find_cells import find_summed, find_unsummed
from moec.passes.experts.found import Found, as_trained, idle_is_zero, maps_zero_to_zero, obstacle, say_sum
from moec.passes.experts.seated import GRID_COMBINING, TAKEN_BACK, match_on_grid, routing_of, say
from moec.passes.experts.torn import GOES_ON, torn_out
from moec.passes.grid.picked import match_picked, say_picked
from moec.passes.grid.rules import with_grids
from moec.passes.rows.body import NOTHING, BodyMatch, match_body
from moec.passes.rows.lift import Lifter
from moec.passes.rows.pairs import Writer
from moec.passes.rows.rows import Part
from moec.passes.rows.sums import part_of_sum
from moec.passes.rows.token_axes import at_choice, names_once, token_axes
from moec.pipeline import Facts, Miss, Outcome


@dataclass(frozen=True)
class FindExperts:
    """Rewrite each sum over experts' rows to one `experts` instruction."""

    name: str = "find-experts"

    def run(self, graph: Graph, facts: Facts) -> Outcome:
        """Every root that is understood, rewritten; the others, with their reasons."""
        lifter = lifter_of(graph)
        found: dict[str, Found] = {}
        misses: list[Miss] = []

        def note(instr: Instr, outcome: Found | NoMatch) -> None:
            if isinstance(outcome, Found) and facts.out_of_fuel(len(found)):
                outcome = NoMatch("rewrite fuel is spent", depth=2)
            if isinstance(outcome, Found) and instr.results[0] in facts.refused:
                outcome = NoMatch(facts.refused[instr.results[0]], depth=9)
            if isinstance(outcome, Found):
                found[instr.results[0]] = outcome
            elif outcome.depth >= 2 and not _is_mask(lifter, instr):
                misses.append(Miss(instr.results[0], instr.loc, outcome))

        for instr in graph.instrs:
            if instr.word in ROOTS and (not part_of_sum(graph, instr) or added_rows(lifter, instr) is not None):
                note(instr, find_any(lifter, instr, facts))
        result = _with(graph, found)
        for instr in result.instrs:  # what no sum took: rows of one expert a token
            if instr.results and instr.word in LAST and instr is graph.defs.get(instr.results[0]):
                note(instr, find_unsummed(lifter, instr, facts))
        result = _with(graph, found)
        while torn := torn_out(graph, result, {root: each.instrs for root, each in found.items()}):
            misses += (Miss(root, graph.defs[root].loc, GOES_ON) for root in torn)
            found = {root: each for root, each in found.items() if root not in torn}
            result = _with(graph, found)
        return Outcome(result, len(found), tuple(m for m in misses if m.value in result.defs), tuple(found))


def _with(graph: Graph, found: Mapping[str, Found]) -> Graph:
    """The graph with roots replaced, without what only they needed."""
    instrs = [
        new for old in graph.instrs for new in (found[old.results[0]].instrs if old.results[0] in found else (old,))
    ]
    return sweep(graph.with_instrs(instrs))


ROOTS = COMBINING | GRID_COMBINING
"""Words that may bring experts' rows together."""


def lifter_of(graph: Graph) -> Lifter:
    """A lifter that knows all rules of rows and masks."""
    return Lifter(graph, with_grids(RULES), hot_lifter(graph), cell_lifter(graph))


def find_any(lifter: Lifter, instr: Instr, facts: Facts) -> Found | NoMatch:
    """The experts whose rows come together in `instr`, as a sum of slots or on a grid."""
    found = find_at(lifter, instr, facts) if instr.word in COMBINING else NoMatch("not a sum over tokens")
    if isinstance(found, Found) or instr.word not in GRID_COMBINING:
        return found
    on_grid = find_on_grid(lifter, instr, facts)
    if isinstance(on_grid, Found):
        return on_grid
    by_letters = find_summed(lifter, instr, facts)
    return by_letters if isinstance(by_letters, Found) else nearest([found, on_grid, by_letters])


def _is_mask(lifter: Lifter, instr: Instr) -> bool:
    """Whether a value is known to be part of a router's masks, not of experts' results."""
    return lifter.masks is not None and not isinstance(lifter.masks.lift(Ref(instr.results[0])), NoMatch)


def find_at(lifter: Lifter, instr: Instr, facts: Facts) -> Found | NoMatch:
    """The experts whose rows come together in `instr`; a miss says which predicates had held before it."""
    held: list[str] = []
    found = _find(lifter, instr, facts, held)
    return found.after(*held) if isinstance(found, NoMatch) else found


def _find(lifter: Lifter, instr: Instr, facts: Facts, held: list[str]) -> Found | NoMatch:
    """The stages of a match, in order; `held` gets a line for each that holds (see `near_miss.STAGES`)."""
    total = combined(lifter, instr)
    if isinstance(total, NoMatch):
        return total
    held.append(f"each token sums its experts' rows (form: {total.form})")
    anchor = total.rows.loop
    part = part_of(lifter, anchor)
    body = _body(lifter, instr, total, part)
    if isinstance(body, NoMatch):
        return body
    held.append(
        f"an expert is matrices and pointwise functions: E={body.num_experts}, F={body.width}, φ={body.spec.activation}"
    )
    for loop in (*total.rows.earlier, *([anchor] if anchor else [])):
        left_out = _left_out(lifter, loop, body, total)
        if left_out is not None:
            return left_out.deeper(6)
    held.append("every expert is visited")
    routed = _routing(lifter, total, body)
    if isinstance(routed, NoMatch) and total.rows.space.kind == "dense":
        return _gated(lifter, instr, total, body, facts, routed)
    if isinstance(routed, NoMatch):
        return routed.deeper(6)
    held.append("each row has one chosen expert and one weight")
    if part is not None and total.rows.choice in lifter.tables:
        return NoMatch("the loop runs some of the experts that masks choose", instr.results[0], 6)
    prelude, weights, choice = routed
    body = as_trained(lifter.graph, facts, body)
    blocked = obstacle(lifter.graph, facts, body)
    if blocked is not None:
        return blocked
    if part is not None and any(name.endswith(NOTHING) for group in body.params for name in group):
        return NoMatch("one projection has a bias, the other has none, in a loop over some experts", body.token, 6)
    if part is not None and choice not in lifter.graph.types:
        return NoMatch("a loop over some experts drops some of their rows", instr.results[0], 6)
    if part is not None:
        first, choice, body, total = some_experts(lifter, instr, total, body, part, choice)
        prelude = (*prelude, *first)
    return say_sum(lifter.graph, instr, total, body, prelude, weights, choice)


def _body(lifter: Lifter, root: Instr, total: Combined, part: Part | None) -> BodyMatch | NoMatch:
    """An expert's function of its rows as they were before the loop."""
    row, *_ = unguarded(total.rows.row)
    body = match_body(lifter.graph, row, None if part is None or part.above else part.limit)
    if isinstance(body, NoMatch):
        return body.deeper(2)
    meets = meets_an_expert(lifter, total.rows, body.num_experts)
    return meets.deeper(5) if meets is not None else body_as_before(lifter.graph, body, total, root)


def _left_out(lifter: Lifter, loop: str, body: BodyMatch, total: Combined) -> NoMatch | None:
    """Why a loop may leave out an expert that has rows, or None."""
    if loop in total.rows.earlier and part_of(lifter, loop) is not None:
        return NoMatch("a loop whose rows are cut again runs some experts alone", loop)
    skipped = only_idle_skipped(lifter, loop)
    if skipped is not None:
        return skipped
    others = asked_of_others(lifter, loop, total.rows.choice, body) if total.rows.choice else None
    if others is not None:
        return others
    beyond = lifter.beyond.get(loop)
    if beyond is not None and not (body.num_experts.is_Integer and beyond >= body.num_experts):
        return NoMatch(f"the loop skips expert {beyond} of {body.num_experts}", loop)
    return full_run(lifter, loop, body.num_experts, total.rows.choice)


def _gated(
    lifter: Lifter, instr: Instr, total: Combined, body: BodyMatch, facts: Facts, why: NoMatch
) -> Found | NoMatch:
    """Every expert on every token, with gates that are a mask of choices times numbers."""
    routing = routing_of(lifter, total.rows, None, body)
    if isinstance(routing, NoMatch):
        return nearest([routing.deeper(6), why.deeper(6)])
    if not idle_is_zero(body) or total.base:
        return NoMatch("an expert maps a zero row to something else than zero", body.weight, 6)
    said = obstacle(lifter.graph, facts, body) or say(lifter, instr, total.rows, body, routing)
    return said if isinstance(said, NoMatch) else Found(instr.results[0], said)


def find_on_grid(lifter: Lifter, instr: Instr, facts: Facts) -> Found | NoMatch:
    """The experts on seats, or on every token, whose rows come together in `instr`."""
    total = match_on_grid(lifter, instr)
    if isinstance(total, NoMatch) and instr.word in TAKEN_BACK:
        return total
    if isinstance(total, NoMatch):
        chosen = find_picked(lifter, instr, facts)
        return chosen if isinstance(chosen, Found) else nearest([total, chosen])
    rows, seats, body = total
    if body.cast or body.spec.codes:
        return NoMatch("matrices of a batch of experts are cast or scaled before they are used", body.weight, 6)
    held = (
        "each token sums its experts' rows",
        f"an expert is matrices and pointwise functions: E={body.num_experts}, φ={body.spec.activation}",
        "every expert is visited",
    )
    routing = routing_of(lifter, rows, seats, body)
    table = support(lifter.graph, body.weight) if isinstance(routing, NoMatch) and seats is None else None
    if isinstance(routing, NoMatch) and (table is None or not body.by_expert):
        return routing.deeper(6).after(*held)
    if seats is None and not idle_is_zero(body):
        return NoMatch("an expert maps a zero row to something else than zero", body.weight, 6).after(*held)
    blocked = obstacle(lifter.graph, facts, body)
    if blocked is not None:
        return blocked
    if isinstance(routing, NoMatch):
        said = routing if table is None else say_support(lifter, instr, body, table)
    else:
        said = say(lifter, instr, rows, body, routing)
    return said if isinstance(said, NoMatch) else Found(instr.results[0], said)


def find_picked(lifter: Lifter, instr: Instr, facts: Facts) -> Found | NoMatch:
    """The experts on the tokens that each of them picked, whose outputs `instr` makes."""
    body = match_picked(lifter, instr)
    if isinstance(body, NoMatch):
        return body
    if body.cast or body.spec.codes:
        return NoMatch("matrices of a batch of experts are cast or scaled before they are used", body.weight, 6)
    blocked = obstacle(lifter.graph, facts, body)
    said = blocked if blocked is not None else say_picked(lifter, instr, body)
    return said if isinstance(said, NoMatch) else Found(instr.results[0], said)


def _routing(lifter: Lifter, total: Combined, body: BodyMatch) -> tuple[tuple[Instr, ...], str, str] | NoMatch:
    """The values w[T, k] and e[T, k], and instructions that make w where the user did not."""
    if total.rows.space.kind == "dense":
        return _dense_routing(lifter, body)
    choice = total.rows.choice
    if not choice:
        return NoMatch("nothing says which experts a token goes to", total.root)
    first = lifter.firsts.get(choice)
    if not isinstance(first, First):
        return _routed_by(lifter, total, body, choice)
    whole = _routed_by(lifter, total, body, first.choice)
    if isinstance(whole, NoMatch):
        return whole
    return first_choice(lifter.graph, lifter.graph.defs[total.root], first, whole, int(body.num_experts))


def _routed_by(
    lifter: Lifter, total: Combined, body: BodyMatch, choice: str
) -> tuple[tuple[Instr, ...], str, str] | NoMatch:
    """The same, of all rows that a choice, or part of one, gives the experts."""
    if choice in lifter.tables:
        root = lifter.graph.defs[total.root]
        return table_choice(lifter, root, choice, body.weight, body.by_expert, int(body.num_experts))
    if choice in lifter.kept:
        made = kept_choice(lifter, lifter.graph.defs[total.root], choice)
        if isinstance(made, NoMatch):
            return made
        if body.by_expert:
            return NoMatch("gates of every expert weight rows of which some are dropped", total.root)
        if not body.weight:
            return made[0], "", made[1]
        return made_shape(lifter, *made, body.weight) or (made[0], body.weight, made[1])
    if choice in lifter.weighed:
        return weighed_choice(lifter, lifter.graph.defs[total.root], choice, body.weight, body.by_expert)
    space = total.rows.space
    by_mask = space.kind == "loop" or (space.kind == "sorted" and space.order)
    once = by_mask and set(space.order) <= {"t", *token_axes(lifter.graph, choice)}
    if once and (body.by_expert or not body.weight) and not names_once(lifter.graph, choice):
        return NoMatch("a token may choose an expert twice, and has one row with it", total.root)
    if not body.by_expert:
        return (), body.weight, choice
    out = Writer(lifter.graph, lifter.graph.defs[total.root])
    weights = at_choice(out, body.weight, choice)
    return weights if isinstance(weights, NoMatch) else (tuple(out.instrs), weights, choice)


def _dense_routing(lifter: Lifter, body: BodyMatch) -> tuple[tuple[Instr, ...], str, str] | NoMatch:
    """Gates g[T, E] that are 0 but at the chosen experts: w = gather(g, e), when an unchosen row contributes 0."""
    if not body.by_expert:
        return NoMatch("every expert runs on every token with no gate")
    graph = lifter.graph
    functions: list[Instr] = []
    made = graph.defs.get(body.weight)
    while made is not None and made.word != "scatter":
        functions.append(made)
        made = graph.defs.get(made.uses[0]) if made.uses else None
    if made is None or made.attr("dim") != 1:
        return NoMatch(f"gates %{body.weight} are not a scatter of chosen scores: every expert counts", body.weight)
    base = graph.defs.get(made.uses[0])
    if base is None or base.word != "full":
        return NoMatch("gates are scattered into something else than a constant", body.weight)
    rest = _image(functions, base.attr("value"))
    if rest != 0.0:
        return NoMatch(f"an unchosen expert has gate {rest}, expected 0", body.weight)
    if body.spec.bias_out or (body.spec.weight_on == "input" and not maps_zero_to_zero(body)):
        return NoMatch("an expert maps a zero row to something else than zero", body.weight)
    choice = made.uses[1]
    kind = Type(graph.types[body.weight].dtype, graph.types[choice].shape)
    name = f"{body.weight}.chosen"
    gathered = Instr((name,), "gather", (Ref(body.weight), Ref(choice)), (kind,), (("dim", 1),), made.loc)
    return (gathered,), name, choice


def _image(functions: list[Instr], value: object) -> float | None:
    """What a chain of pointwise functions makes of one number; None when it is not such a chain."""
    if not isinstance(value, float):
        return None
    x = torch.tensor(value, dtype=torch.float64)
    for instr in reversed(functions):
        if instr.word in ("cast", "same"):
            continue
        if instr.word not in ex.POINTWISE or ex.POINTWISE[instr.word].arity != 1:
            return None
        x = ex.POINTWISE[instr.word].eager(x)
    return float(x)
