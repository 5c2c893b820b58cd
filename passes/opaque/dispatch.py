"""Experts that are no MLPs: their rows are sorted once, each expert's code runs on one contiguous slice, and the
results are put back once. The code itself stays what the user wrote.

for e: rows = where(idx == e); y.index_add_(0, rows, f_e(x[rows]))   →   xs = x[sorted]; for e: f_e(xs[start:end]); y
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from moec.ir.graph import Graph, Instr
from moec.ir.match import NoMatch
from moec.passes.dispatch.combine import OF_ROWS, combined
from moec.passes.dispatch.partial import part_of
from moec.passes.dispatch.rereads import reread
from moec.passes.dispatch.row_rules import RULES
from moec.passes.dispatch.runs import full_run
from moec.passes.dispatch.skips import asked_of_others, only_idle_skipped
from moec.passes.dispatch.turns import goes_on, loops_of
from moec.passes.dispatch.weighed import Weighed
from moec.passes.opaque.rows import opaque_rows, varying
from moec.passes.rows.body import BodyMatch, match_body
from moec.passes.rows.lift import Lifter
from moec.passes.rows.rows import Anchor, Expert, Opaque, Row, Rows
from moec.passes.rows.token_axes import choice_axes

_IS_MLP = 6  # how deep a miss of `match_body` is when only the parameters are not what kernels take
_ORDERS = {"ts": False, "t": False, "st": True}


@dataclass(frozen=True)
class OpaqueSite:
    """A loop over experts whose bodies stay as they are.

    root     the value that the experts' rows come together in
    anchor   the loop
    form     loop | hit_loop: rows by masks, to be sorted; grouped: the user sorts
    axes     how many axes the tokens have
    body     the words between an expert's rows and its results
    """

    root: str
    anchor: str
    form: str
    choice: str
    experts: int
    top_k: int
    order: str
    body: tuple[str, ...]
    loc: str = ""
    axes: int = 1


def find_opaque(graph: Graph) -> tuple[OpaqueSite, ...]:
    """The loops left in a graph that dispatch rows to experts, run any code on them and put the results together."""
    lifter = Lifter(graph, RULES, fallback=opaque_rows)
    sums = (_site(lifter, instr) for instr in graph.instrs if instr.word in OF_ROWS)
    sites = [site for site in sums if isinstance(site, OpaqueSite)]
    loops = loops_of(graph)[0] if sites else {}
    found: dict[str, OpaqueSite] = {}
    for site in sites:
        if not goes_on(graph, site.root, loops):
            # Two sums of one loop cannot both be taken out of it.
            found.setdefault(site.anchor, site)
    return tuple(found.values())


def _site(lifter: Lifter, instr: Instr) -> OpaqueSite | NoMatch:
    total = combined(lifter, instr)
    if isinstance(total, NoMatch):
        return total
    graph, rows = lifter.graph, total.rows
    anchor = rows.loop
    choice = _chosen(lifter, rows)
    alone = anchor and part_of(lifter, anchor) is None and not rows.earlier and not total.over
    if not alone or choice is None or not _holds_opaque(rows.row):
        return NoMatch("no loop over experts with a body of its own")
    body = match_body(graph, rows.row)
    if _for_kernels(graph, body, instr):
        return NoMatch("the experts are MLPs, which were left as they are for another reason")
    experts, letters = _experts(lifter, anchor), choice_axes(graph, choice)
    slots = graph.types[choice].shape[-1] if "s" in letters else sympy.S.One
    if experts is None or not letters or not slots.is_Integer:
        return NoMatch("the number of experts is not known")
    skipped = only_idle_skipped(lifter, anchor) or full_run(lifter, anchor, sympy.Integer(experts), rows.choice)
    skipped = skipped or asked_of_others(lifter, anchor, rows.choice) or reread(graph, anchor, instr)
    beyond = lifter.beyond.get(anchor)
    if skipped is not None or (beyond is not None and beyond < experts):
        return skipped or NoMatch(f"the loop skips expert {beyond}")
    form = {"anchor": "hit_loop"}.get(graph.defs[anchor].word, "loop")
    k = int(slots)
    order = rows.space.order if total.form in ("loop", "hit_loop") else ""
    sorts = order in graph.defs or rows.anchor
    if not sorts and (order not in _ORDERS or (order == "t" and k > 1 and not _distinct(graph, choice))):
        return NoMatch("rows are in an order that no sort gives")
    return OpaqueSite(
        total.root,
        anchor,
        "grouped" if sorts else form,
        choice,
        int(experts),
        k,
        "" if sorts else order,
        _body_words(graph, anchor),
        instr.loc,
        len(letters) - ("s" in letters),
    )


def _chosen(lifter: Lifter, rows: Rows) -> str | None:
    """The choice of a graph that rows go by; where the user sorts them, it may be one that leaves pairs out."""
    found = lifter.weighed.get(rows.choice) if rows.anchor else None
    choice = found.choice if isinstance(found, Weighed) else rows.choice
    return choice if choice in lifter.graph.types else None


def _for_kernels(graph: Graph, body: BodyMatch | NoMatch, root: Instr) -> bool:
    """Whether experts are MLPs as kernels take them: as wide behind as before."""
    if isinstance(body, NoMatch):
        return body.depth >= _IS_MLP
    return graph.types[body.token].shape[-1] == root.types[0].shape[-1]


def _holds_opaque(row: Row) -> bool:
    """Whether anything but gathers and pointwise functions stands in a row."""
    if isinstance(row, Opaque):
        return True
    inner = [getattr(row, "row", None), *getattr(row, "args", ())]
    return type(row).__name__ == "Dot" or any(_holds_opaque(r) for r in inner if r is not None)


def _distinct(graph: Graph, choice: str) -> bool:
    made = graph.defs.get(choice)
    return made is not None and made.word == "topk"


def _experts(lifter: Lifter, anchor: str) -> int | None:
    """How many experts there are, by the tensors that the loop picks from or takes slices of."""
    graph = lifter.graph
    counts: set[int] = set()
    moved = varying(graph)
    for instr in graph.instrs:
        if instr.word == "pick" and instr.uses[-1] in moved:
            counts.add(len(instr.uses) - 1)
        if instr.word == "take" and isinstance(lifter.lift_result(instr), Expert):
            item, size = lifter.lift(instr.args[1]), lifter.type(instr.args[0]).shape[0]
            counts |= {int(size)} if size.is_Integer and isinstance(item, Anchor) and item.name == anchor else set()
    end = graph.defs[anchor].args[1] if graph.defs[anchor].word == "anchor_range" else None
    if not counts and isinstance(end, int):
        counts.add(end)
    return counts.pop() if len(counts) == 1 else None


def _body_words(graph: Graph, anchor: str) -> tuple[str, ...]:
    plain = {"pick", "take", "end", "eq", "skip", "skip_size", "where_indices", "index", "reshape", "anchor", "turn"}
    inside: dict[str, None] = {}
    started = False
    for instr in graph.instrs:
        started = started or instr.results[0] == anchor
        if started and instr.results[0] in varying(graph) and instr.word not in plain | OF_ROWS:
            inside[str(instr.attr("target")) if instr.word == "opaque" else instr.word] = None
        if instr.word == "end" and started:
            break
    return tuple(inside)
