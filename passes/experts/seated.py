"""Experts on seats, or on every token: where their rows come together, said as one `experts` instruction.

einsum("tec,ech->th", combine, experts(einsum("tec,th->ech", dispatch, x)))   →   experts(x, w[T, k], e[T, k], …)

The same pairs are kept as by the masks; a pair that is dropped gets expert −1. Nothing of size [T, E, C] is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from moec.ir.dims import dim_text
from moec.ir.dtypes import DTYPES
from moec.ir.formulas import at_least
from moec.ir.graph import Arg, Dim, Graph, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.capacity.infer import always, longest
from moec.passes.capacity.priority import queued_as
from moec.passes.capacity.products import distinct
from moec.passes.experts.found import other_shape
from moec.passes.grid.chains import Slots, chained
from moec.passes.grid.flat_seats import returned
from moec.passes.grid.rows import Grid, labels, on_grid, seats_of
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.body import BodyMatch, match_body
from moec.passes.rows.hot import Hot, Pairs, Place, Seats, Term, flat, implied, letters_of, whose
from moec.passes.rows.lift import Lifter, same
from moec.passes.rows.pairs import Choice, Writer, joined, routed
from moec.passes.rows.rows import Apply, Gate, Rows
from moec.passes.rows.say_experts import say_experts

GRID_COMBINING = frozenset({"contract", "reduce_sum", "add", "cat", "stack", "mul", "index", "gather"})
TAKEN_BACK = frozenset({"mul", "index", "gather"})
"""Words that end a layer only where rows are taken back from their seats, one a token."""


@dataclass(frozen=True)
class Routing:
    """Terms to turn into indices, the dtype of their weights, and the capacity that was proved or enforced."""

    terms: tuple[Term, ...]
    dtype: str
    seats: Dim | None = None


def combined_on_grid(lifter: Lifter, instr: Instr) -> tuple[Rows, Seats | None] | NoMatch:
    """The weighted rows that `instr` sums over experts, and the combine table where that gives the weights."""
    back = returned(lifter, instr, GRID_COMBINING)
    if back is not None or instr.word in TAKEN_BACK:
        return NoMatch("no rows taken back from seats") if back is None else back
    if instr.word == "reduce_sum":
        return _summed(lifter, instr)
    if instr.word == "add":
        return chained(lifter, instr)
    if instr.word != "contract":
        return NoMatch("not a sum over experts")
    (left, right), out = equation_of(instr)
    for gates, x, at, of in ((*instr.args, left, right), (*instr.args[::-1], right, left)):
        seats = seats_of(lifter, gates)
        if seats is None and len(of) < 3:
            continue
        rows = lifter.lift(x)
        if not isinstance(rows, Rows) or not on_grid(rows):
            why = _no_rows(lifter, rows, gates, seats, (at, of, out))
            if why is None:
                continue
            return why
        label = dict(zip(of, labels(rows), strict=False))
        if seats is not None:
            theirs = dict(zip(at, seats.axes, strict=True))
            shared = [c for c in at if c in of]
            gone = flat(tuple(theirs[c] for c in shared if c not in out))
            agree = all(theirs[c] == label.get(c) for c in shared)
            if not agree or sorted(gone) != ["c", "e"] or out[-1] != of[-1]:
                return NoMatch(f"combine {instr.attr('eq')} does not give each seat back to its token", depth=4)
            kept = flat(tuple(theirs[c] for c in out[:-1]))
            if kept != "".join(sorted(kept)) or set(out[:-1]) - set(at):
                return NoMatch(f"combine {instr.attr('eq')} moves tokens", depth=4)
            return rows, seats
        return _gated(lifter, instr, rows, gates, (at, of, out))
    return NoMatch("not a sum over experts")


def _no_rows(
    lifter: Lifter, rows: object, gates: Arg, seats: Seats | None, letters: tuple[str, str, str]
) -> NoMatch | None:
    """Why "tec,ech->th" is no sum of experts' rows on seats; None where it is no such sum at all."""
    if seats is not None:
        found = rows.deeper() if isinstance(rows, NoMatch) else NoMatch("seats hold something else", depth=2)
        return None if seats.unit else found
    at, of, out = letters
    whole = len(set(at) & set(of) - set(out)) == 2 and len(of) == len(at) == 3 and out[-1] == of[-1]
    why = lifter.masks.lift(gates) if whole and lifter.masks is not None else None
    if not isinstance(why, NoMatch) or not isinstance(gates, Ref):
        return None
    return NoMatch(f"the table of seats %{gates.name} is not understood: {why.reason}", why.at or gates.name, 4)


def _gated(
    lifter: Lifter, instr: Instr, rows: Rows, gates: Arg, letters: tuple[str, str, str]
) -> tuple[Rows, None] | NoMatch:
    """einsum("te,teh->th", gates, rows) and its batched spelling."""
    at, of, out = letters
    axes = labels(rows)
    label = dict(zip(of, axes, strict=False))
    mine = tuple(label.get(c, "1") for c in at)
    gone = [c for c in of if c not in out]
    made = lifter.instr(gates)
    if "1" in mine and made is not None and made.word == "reshape" and lifter.type(made.args[0]).rank == len(mine) - 1:
        gates, mine = made.args[0], tuple(a for a in mine if a != "1")  # bmm of gates[T, 1, E]
    if not isinstance(gates, Ref) or mine[-1:] != ("e",) or [label.get(c) for c in gone] != ["e"]:
        return NoMatch("not a sum of gated rows over experts")
    tokens = tuple(a for a in axes if a not in ("e", "1"))
    if mine[:-1] != tokens or lifter.type(gates).rank != len(mine):
        return NoMatch("gates are of other tokens than rows", depth=3)
    return replace(rows, row=Apply("mul", (rows.row, Gate(gates.name)))), None


def _summed(lifter: Lifter, instr: Instr) -> tuple[Rows, None] | NoMatch:
    """rows[…, E, …, H].sum(the expert axis)."""
    dims = instr.attr("dims")
    if lifter.type(instr.args[0]).rank < 3 or not isinstance(dims, tuple) or len(dims) != 1 or instr.attr("keepdim"):
        return NoMatch("not a sum over experts")
    rows = lifter.lift(instr.args[0])
    if not isinstance(rows, Rows) or not on_grid(rows):
        return rows if isinstance(rows, NoMatch) else NoMatch("not a sum over experts")
    if int(str(dims[0])) >= rows.lead or labels(rows)[int(str(dims[0]))] != "e":
        return NoMatch("not a sum over experts")
    return rows, None


def routing_of(lifter: Lifter, rows: Rows, seats: Seats | None, body: BodyMatch) -> Routing | NoMatch:
    """Which pairs there are, from the masks that sent tokens and brought rows back."""
    masks = lifter.masks
    assert masks is not None
    if seats is None:
        if isinstance(rows.space, Grid) and rows.space.key:
            return NoMatch("seats are summed without a combine table", depth=3)
        if not body.by_expert:
            return NoMatch("every expert runs on every token with no gate", depth=3)
        return _gates_of(lifter, masks, body.weight)
    if not rows.space.key or body.weight:
        return NoMatch("rows on seats are weighted before they are combined", depth=3)
    sent = masks.lift(Ref(rows.space.key))
    assert isinstance(sent, Seats)
    wrong = _sound(masks, sent, seats)
    if wrong:
        return NoMatch(wrong, rows.space.key, 5)
    return Routing(tuple(_needed(masks, t) for t in seats.terms), "", seats.terms[0].seats)


def _gates_of(lifter: Lifter, masks: Lifter, name: str) -> Routing | NoMatch:
    """The pairs of gates that are masks of choices times numbers."""
    held = masks.lift(Ref(name))
    terms: list[Term] = []
    for gates in held.parts if isinstance(held, Slots) else (held,):
        if not isinstance(gates, Hot) or gates.place is not None:
            why = gates.reason if isinstance(gates, NoMatch) else "they are no mask of choices"
            return NoMatch(f"every expert counts for every token: gates %{name}: {why}", name, 3)
        order = flat(tuple(a for a in gates.axes if a != "e"))
        if order != "".join(sorted(order)):
            return NoMatch("gates have the tokens in another order than the choices", name, 3)
        if gates.summed and not distinct(masks, gates.base, gates.summed):
            return NoMatch("a token may choose an expert twice", name, 3)
        none = Place((), 0, frozenset())
        terms.append(Term(gates.base, none, sympy.S.Zero, gates.only, gates.factors, gates.summed))
    kind = lifter.graph.types.get(name)
    return Routing(tuple(terms), kind.dtype if kind is not None else name.partition(" ")[0])


def _needed(masks: Lifter, term: Term) -> Term:
    """The term without conditions that always hold."""
    return replace(term, only=frozenset(c for c in term.only if not always(masks, c)))


def _sound(masks: Lifter, sent: Seats, back: Seats) -> str:
    """'' when every pair that comes back sits alone on the seat it was sent to; else what is wrong."""
    for term in back.terms:
        twin = [
            t
            for t in sent.terms
            if (t.base, t.place.queue, t.place.offset) == (term.base, term.place.queue, term.place.offset)
        ]
        if len(twin) != 1:
            return "tokens come back from other seats than they were sent to"
        if not all(implied(cond, term.only) for cond in twin[0].only):
            return "a token comes back from a seat that it was not sent to"
    for term in sent.terms:
        wrong = _alone(masks, term, sent.terms)
        if wrong:
            return wrong
    return ""


def _alone(masks: Lifter, term: Term, terms: tuple[Term, ...]) -> str:
    place, own = term.place, term.place.queue[-1]
    letters = "".join(letters_of(masks.graph.types[whose(term.base)].rank))
    sits = own.only <= term.only and all(implied(c, term.only) for c in place.given)
    if not queued_as(masks.graph, own.base, term.base) or not sits:
        return "a token that is not in the queue gets a seat"
    groups = set(letters) - set(own.order)
    if groups & set(term.summed):
        return "a token's choices queue apart and share seats"
    if place.offset < 0:
        return f"places are counted from {place.offset}"
    enough = term.seats - place.offset
    if not at_least(enough, longest(masks, place.queue)) and not any(
        c.queue == place.queue
        and all(implied(g, term.only) for g in c.given)
        and c.bound is not None
        and at_least(enough, c.bound)
        for c in term.only
    ):
        bounds = [dim_text(c.bound) for c in term.only if c.queue == place.queue and c.bound is not None]
        return f"places below {', '.join(bounds) or 'no bound'} are kept for {dim_text(enough)} seats"
    for other in terms:
        if other is term:
            continue
        if len(other.place.queue) == len(place.queue):
            return "two choices count their places apart and share seats"
        if len(other.place.queue) < len(place.queue) and not _behind(masks.graph, place.queue[:-1], other):
            return "a later choice does not queue behind an earlier one"
    return ""


def _behind(graph: Graph, queue: tuple[Pairs, ...], other: Term) -> bool:
    """Whether counts in `queue` cover every pair of `other` that sits."""
    own = other.place.queue[-1]
    for pairs in queue:
        if not queued_as(graph, pairs.base, other.base) or set(pairs.order) != set(own.order):
            continue
        extra = pairs.only - own.only
        if own.only <= pairs.only and extra <= other.only and all(c.queue == other.place.queue for c in extra):
            return True
    return False


def say(lifter: Lifter, root: Instr, rows: Rows, body: BodyMatch, routing: Routing) -> tuple[Instr, ...] | NoMatch:
    """The instructions that replace `root`."""
    graph = lifter.graph
    out = Writer(graph, root)
    to, x = root.types[0], graph.types[body.token]
    alike = x.rank >= 2 and _real(to) == (*_real(x)[:-1], body.out)
    if not alike or x.dtype not in DTYPES or to.dtype not in DTYPES:
        return other_shape(x, to, root)
    dtype = routing.dtype or to.dtype
    weights: list[str] = []
    experts: list[str] = []
    for term in routing.terms:
        if term.base not in graph.types:
            return NoMatch(f"choices %{term.base} stay in another order than their tokens", root.results[0], 6)
        kind = graph.types[term.base]
        own = kind.shape[:-1] if term.summed else kind.shape
        if term.summed not in ("", letters_of(kind.rank)[-1]) or not same(sympy.Mul(*own), sympy.Mul(*x.shape[:-1])):
            return NoMatch(f"choices %{term.base} are not of the tokens {x}", term.base, 6)
        found = routed(out, Choice(term.base, term.summed), term.factors, tuple(term.only), dtype)
        if isinstance(found, NoMatch):
            return found.deeper(6)
        weights.append(found[0])
        experts.append(found[1])
    w, e = joined(out, weights), joined(out, experts)
    form = "capacity_einsum" if routing.seats is not None else "dense"
    return say_experts(out, body, w, e, form, *_capacity(graph, routing))


def _capacity(graph: Graph, routing: Routing) -> tuple[tuple[str, str], ...]:
    """How many rows an expert may get in one queue, what happens to the others, how many queues there are.

    And all its seats, each of which one pair has at most.
    """
    if routing.seats is None:
        return ()
    bounds = {c.bound for t in routing.terms for c in t.only if c.queue}
    (limit,) = bounds if len(bounds) == 1 else (None,)
    queues = {_queues(graph, t) for t in routing.terms}
    return (
        ("capacity", dim_text(routing.seats if limit is None else limit)),
        *((("drop", "never"),) if not bounds else ()),
        *(("queues", dim_text(n)) for n in queues if len(queues) == 1 and n != 1),
        *(("seats", dim_text(n * routing.seats)) for n in queues if len(queues) == 1),
    )


def _queues(graph: Graph, term: Term) -> Dim:
    """Groups of tokens that queue apart: the axes of the choice that no place counts along."""
    kind, own = graph.types[term.base], term.place.queue[-1]
    sizes = dict(zip(letters_of(kind.rank), kind.shape, strict=True))
    return sympy.Mul(*(size for letter, size in sizes.items() if letter not in own.order + term.summed))


def _real(kind: Type) -> tuple[Dim, ...]:
    """The sizes other than 1, features last."""
    return (*(d for d in kind.shape[:-1] if d != 1), kind.shape[-1])


def match_on_grid(lifter: Lifter, instr: Instr) -> tuple[Rows, Seats | None, BodyMatch] | NoMatch:
    """The grid rows that come together at `instr`, and the expert that made them."""
    total = combined_on_grid(lifter, instr)
    if isinstance(total, NoMatch):
        return total
    rows, seats = total
    body = match_body(lifter.graph, rows.row)
    if isinstance(body, NoMatch):
        return body.deeper(2)
    if not body.num_experts.is_Integer or not body.width.is_Integer:
        return NoMatch(f"{body.num_experts} experts of width {body.width}", instr.results[0], 6)
    if dict(rows.space.sizes if isinstance(rows.space, Grid) else ()).get("e", body.num_experts) != body.num_experts:
        return NoMatch("rows and parameters are of different numbers of experts", instr.results[0], 6)
    return rows, seats, body
