"""The row rules of runs: rows sorted by expert, cut where the counts say, in a rolled loop over the cuts.

count(e) = counts[e], end(e) = cumsum(counts)[e], start(e) = end(e) − count(e) however it is written; the rows
start(e) … end(e) − 1 of anything in expert order are expert e's rows, in the order of the sort.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moec.ir.graph import Arg, Dim, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.dispatch.served import clamped_ids
from moec.passes.rows.lift import First, Lift, Lifter, Rule, tried_first
from moec.passes.rows.rows import Anchor, Edge, Idle, Ids, OneHot, PerExpert, Rows, Shifted, Space, Span


def with_runs(rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """The rules, with those of runs before them."""
    return tried_first({**rules, **NEW}, BEFORE)


def rule_carry_int(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """start = 0; each iteration: start = start + count(e), or start = end(e)."""
    name = instr.results[0]
    turns = [i for i in lifter.graph.users.get(name, ()) if i.word == "turn" and i.args[0] == Ref(name)]
    if instr.args[0] != 0 or len(turns) != 1:
        return NoMatch(f"a running number starts at {instr.args[0]}, expected 0", name)
    made = lifter.instr(lifter.graph.behind(turns[0].args[1], ("cast", "same")))
    if made is None or made.word != "add" or Ref(name) not in made.args:
        last = lifter.lift(turns[0].args[1])
        if isinstance(last, Edge) and last.what == "end":
            return replace(last, what="start")
        return NoMatch("a running number changes by something else than adding", name)
    by = lifter.lift(made.args[1] if made.args[0] == Ref(name) else made.args[0])
    if isinstance(by, Edge) and by.what == "count":
        return replace(by, what="start")
    return by if isinstance(by, NoMatch) else NoMatch("a running number grows by something else than counts", name)


def rule_span(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """start(e) … end(e): the places of expert e's rows in expert order."""
    start, stop = (lifter.lift(a) for a in instr.args)
    for bound in (start, stop):
        if isinstance(bound, NoMatch):
            return bound
    if not isinstance(start, Edge) or not isinstance(stop, Edge) or (start.what, stop.what) != ("start", "end"):
        return NoMatch("a slice is not from the start to the end of an expert's rows", instr.results[0])
    if (start.anchor, start.choice) != (stop.anchor, stop.choice):
        return NoMatch("a slice's bounds are of different loops or choices", instr.results[0])
    return Span(start.anchor, start.choice)


def rule_collect(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Every expert's rows, one expert after the other: expert order. Rows by masks: in the order of the loop."""
    rows = lifter.lift(instr.args[0])
    if not isinstance(rows, Rows | Ids):
        return rows if isinstance(rows, NoMatch) else NoMatch(f"collects {type(rows).__name__}", instr.results[0])
    if rows.space.kind != "loop" or rows.layout != "flat":
        return NoMatch("collects something else than rows of a loop", instr.results[0])
    if rows.space.order in lifter.graph.defs:
        whole = NoMatch("collects places that were cut out of expert order", instr.results[0])
        return in_expert_order(rows) if isinstance(rows, Rows) else whole
    space = replace(rows.space, kind="sorted")
    return replace(rows, space=space, anchor=rows.space.key) if isinstance(rows, Rows) else replace(rows, space=space)


def in_expert_order(rows: Rows) -> Rows:
    """The rows of all of a loop's runs together."""
    return replace(rows, space=Space("sorted", rows.space.k, rows.space.order), anchor=rows.space.key)


def rule_cat(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """cat([x]) is x; cat([0, end(0), end(1), …]) are the bounds of every expert's rows."""
    parts = instr.args[0]
    if not isinstance(parts, tuple) or not 1 <= len(parts) <= 2:
        return NoMatch("joins several tensors", instr.results[0])
    if len(parts) == 1:
        return lifter.lift(parts[0])
    ends = lifter.lift(parts[1])
    one = lifter.graph.is_zero(parts[0]) and lifter.type(parts[0]).shape == (1,)
    if one and isinstance(ends, PerExpert) and ends.what == "offsets":
        return replace(ends, what="bounds")
    return NoMatch("joins something else than 0 and the running counts", instr.results[0])


def take_run(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """counts[e], ends[e], bounds[e], bounds[e + 1], ends[e − 1]."""
    held, item = (lifter.lift(a) for a in instr.args)
    if not isinstance(held, PerExpert) or not isinstance(item, Anchor | Shifted):
        return None
    by = item.by if isinstance(item, Shifted) else 0
    what = _LOOKED_UP.get((held.what, by))
    if what is None:
        return NoMatch(f"{held.what} of the experts looked up at the loop's expert {by:+d}", instr.results[0])
    return Edge(item.name, held.choice, what)


_LOOKED_UP = {
    ("counts", 0): "count",
    ("offsets", 0): "end",
    ("offsets", -1): "before",
    ("starts", 0): "start",
    ("starts", 1): "end",
    ("bounds", 0): "start",
    ("bounds", 1): "end",
}

_SUMS = {
    ("add", "start", "count"): "end",
    ("add", "count", "start"): "end",
    ("sub", "end", "count"): "start",
    ("sub", "end", "start"): "count",
    ("sub", "offsets", "counts"): "starts",
}


def number_sum(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """start + count = end, end − count = start, e + 1, ends − counts."""
    if len(instr.args) != 2:
        return None
    a, b = (lifter.lift(x) if isinstance(x, Ref) else x for x in instr.args)
    if isinstance(a, Anchor) and isinstance(b, int) and not isinstance(b, bool):
        return Shifted(a.name, b if instr.word == "add" else -b)
    if isinstance(b, Anchor) and isinstance(a, int) and not isinstance(a, bool) and instr.word == "add":
        return Shifted(b.name, a)
    if isinstance(a, Edge) and isinstance(b, Edge) and (a.anchor, a.choice) == (b.anchor, b.choice):
        what = _SUMS.get((instr.word, a.what, b.what))
        return None if what is None else replace(a, what=what)
    if isinstance(a, PerExpert) and isinstance(b, PerExpert) and a.choice == b.choice:
        what = _SUMS.get((instr.word, a.what, b.what))
        return None if what is None else replace(a, what=what)
    return None


def rule_where(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """where(e == 0, 0, ends[e − 1]) = start(e)."""
    cond, yes, no = instr.args
    made, before = lifter.instr(cond), lifter.lift(no)
    zero = made is not None and made.word == "eq" and made.args[1:] == (0,) and yes == 0
    if zero and made is not None and isinstance(before, Edge) and before.what == "before":
        item = lifter.lift(made.args[0])
        if isinstance(item, Anchor) and item.name == before.anchor:
            return replace(before, what="start")
    return before if isinstance(before, NoMatch) else NoMatch("a choice between numbers", instr.results[0])


_IDLE = {("eq", 0): True, ("le", 0): True, ("lt", 1): True, ("ne", 0): False, ("gt", 0): False, ("ge", 1): False}


def compare_run(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """count == 0, start == end: the expert is idle. flat choices == e: a mask over slots."""
    left, right = instr.args
    a, b = (lifter.lift(x) if isinstance(x, Ref) else x for x in (left, right))
    if isinstance(a, Edge) and a.what == "count" and isinstance(b, int) and (instr.word, b) in _IDLE:
        return Idle(a.anchor, _IDLE[instr.word, b], a.choice)
    edges = isinstance(a, Edge) and isinstance(b, Edge) and (a.anchor, a.choice) == (b.anchor, b.choice)
    if edges and isinstance(a, Edge) and isinstance(b, Edge) and {a.what, b.what} == {"start", "end"}:
        return Idle(a.anchor, instr.word == "eq", a.choice) if instr.word in ("eq", "ne") else None
    for ids, item in ((a, b), (b, a)):
        flat = isinstance(ids, Ids) and (ids.what, ids.space.kind, ids.layout) == ("expert", "slots", "flat")
        if instr.word == "eq" and flat and isinstance(ids, Ids) and ids.space.k > 1 and isinstance(item, Anchor):
            return OneHot(ids.choice, (f"{ids.space.k}",), item.name)
    return None


def rows_of_flat_mask(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """The places where a mask over flat slots is true."""
    mask = lifter.lift(instr.args[0])
    if isinstance(mask, OneHot) and mask.anchor and len(mask.axes) == 1 and mask.axes[0].isdigit():
        return Ids(Space("loop", int(mask.axes[0]), mask.anchor, "ts"), "flat", mask.choice)
    return None


def index_run(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """Anything in expert order, cut at a span: the rows of the loop's expert."""
    table, *ids = instr.args
    found = lifter.lift(ids[0]) if len(ids) == 1 else None
    if not isinstance(found, Span) or instr.attr("dim") != 0:
        return None
    held = lifter.lift(table)
    if isinstance(held, Rows | Ids) and held.layout == "flat" and held.space.kind == "sorted":
        if held.choice and held.choice != found.choice:
            return NoMatch("rows in expert order are cut by the counts of another choice", instr.results[0])
        cut = replace(held, space=Space("loop", held.space.k, found.anchor, held.space.key))
        if isinstance(cut, Rows) and cut.anchor:
            cut = replace(cut, anchor="", earlier=(*cut.earlier, cut.anchor))
        return replace(cut, choice=held.choice or found.choice)
    return held if isinstance(held, NoMatch) else NoMatch("a slice of something not in expert order", instr.results[0])


def write_run(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """y[rows of e] = f(rows of e) for every e: all rows, in the order of y; y[perm] = sorted rows: in slot order."""
    if instr.word == "index_put":
        _base, source, *ids = instr.args
        if instr.attr("accumulate") or instr.attr("dim") != 0:
            return None
        if len(ids) != 1:
            return _write_pairs(lifter, instr, source, ids)
        place = ids[0]
    else:
        _base, place, source = instr.args
        if instr.attr("dim") != 0:
            return _multi_hot(lifter, instr)
    rows, at = lifter.lift(source), lifter.lift(place)
    if not isinstance(rows, Rows) or rows.layout != "flat":
        return None
    if isinstance(at, Span) and rows.space.key == at.anchor and rows.space.order in lifter.graph.defs:
        return replace(in_expert_order(rows), choice=at.choice)
    if not isinstance(at, Ids) or at.what != "flat" or at.layout != "flat":
        return None
    a, b = at.space, rows.space
    if a.same_rows != b.same_rows:
        return NoMatch("rows are written to places in another order", instr.results[0])
    anchor = b.key if b.kind == "loop" else rows.anchor
    return replace(rows, space=Space("slots", a.k), choice=at.choice, via="sorted", anchor=anchor)


def _write_pairs(lifter: Lifter, instr: Instr, source: Arg, ids: list[Arg]) -> Lift | None:
    """y[token, slot] = f(rows of e) for every e: all rows, y being [T, k, …]."""
    rows, *places = (lifter.lift(arg) for arg in (source, *ids))
    known = [at for at in places if isinstance(at, Ids) and at.layout == "flat"]
    if [at.what for at in known] != ["token", "slot"] or not isinstance(rows, Rows) or rows.layout != "flat":
        return None
    k = instr.types[0].shape[1]
    if any(at.space != rows.space for at in known) or rows.space.kind != "loop" or not k.is_Integer:
        return None
    choice, chosen = known[0].choice, lifter.graph.types.get(known[0].choice)
    if chosen is None or chosen.shape != instr.types[0].shape[:2]:
        return None
    return replace(rows, space=Space("slots", int(k)), layout="tk", choice=choice, via="sorted", anchor=rows.space.key)


def _multi_hot(lifter: Lifter, instr: Instr) -> Lift | None:
    """zeros[T, E].scatter(1, choice, 1): which experts a token chose, each at most once."""
    start, index, value = instr.args
    empty, made = lifter.graph.is_zero(start, ("cast", "same")), lifter.instr(index)
    if instr.word != "scatter" or value != 1 or instr.attr("dim") != 1 or not empty or not isinstance(index, Ref):
        return None
    if made is None or made.word != "topk" or index.name != made.results[1]:
        return None  # chosen twice by one token, an expert would be counted once
    return OneHot(index.name, ("t", "e"))


def rule_scatter_add(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """zeros.scatter_add(0, flat choices, ones): how many rows each expert has."""
    base, index, ones = (*instr.args, instr.args[-1])[:3]
    ids = lifter.lift(index)
    made = [lifter.instr(arg) for arg in (base, ones)]
    known = [m is not None and m.word == "full" and m.attr("value") == n for m, n in zip(made, (0, 1), strict=True)]
    if not isinstance(ids, Ids) or (ids.what, ids.layout) != ("expert", "flat") or instr.types[0].rank != 1:
        return ids if isinstance(ids, NoMatch) else NoMatch("adds something else than choices", instr.results[0])
    if not all(known):
        return NoMatch("adds something else than ones to zeros", instr.results[0])
    size = instr.types[0].shape[0]
    return PerExpert("counts", ids.choice, int(size) if size.is_Integer else None)


_CHOOSING = frozenset({"topk", "max", "argmax", "sort"})


def rule_searchsorted(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Where 0, 1, … would go among sorted ids: the starts of the experts' rows, or (`right`) their ends.

    Where the loop's expert would go is where its rows start; where the next one would, is where they end.
    """
    ids, numbers = lifter.lift(instr.args[0]), lifter.instr(lifter.graph.behind(instr.args[1], ("cast", "same")))
    if not isinstance(ids, Ids) or (ids.what, ids.space.kind, ids.layout) != ("expert", "sorted", "flat"):
        return ids if isinstance(ids, NoMatch) else NoMatch("searches something else than sorted ids", instr.results[0])
    made = lifter.instr(lifter.graph.behind(Ref(ids.choice), ("cast", "same", "reshape", "slice", "detach")))
    item = lifter.lift(instr.args[1])
    chosen = made is not None and made.word in _CHOOSING
    if chosen and isinstance(item, Anchor | Shifted):
        what = _PLACED.get((item.by if isinstance(item, Shifted) else 0, bool(instr.attr("right"))))
        edge = Edge(item.name, ids.choice, what) if what else None
        return edge or NoMatch("searches for another expert than the loop's", instr.results[0])
    if numbers is None or numbers.word != "arange" or not chosen:
        return NoMatch("searches for something else than 0, 1, … among ids that are none below 0", instr.results[0])
    return PerExpert("offsets" if instr.attr("right") else "starts", ids.choice)


_PLACED = {(0, False): "start", (1, False): "end", (0, True): "end", (-1, True): "start"}


def flat_one_hot(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """one_hot of flat choices: a mask over slots and experts."""
    ids = lifter.lift(instr.args[0])
    if isinstance(ids, Ids) and (ids.what, ids.space.kind, ids.layout) == ("expert", "slots", "flat"):
        return OneHot(ids.choice, (f"{ids.space.k}", "e"))
    return None


def full_run(lifter: Lifter, anchor: str, experts: Dim, choice: str) -> NoMatch | None:
    """Why a loop may leave out an expert that has rows, or None; the loop may end with the counts it reads."""
    made = lifter.graph.defs[anchor]
    if made.word == "anchor":
        hits = lifter.lift(made.args[0])
        few = isinstance(hits, PerExpert) and hits.bins is not None and hits.bins < experts
        return NoMatch(f"hits of {hits.bins} of {experts} experts are counted", anchor) if few else None  # type: ignore[union-attr]
    end = made.args[1]
    if end == experts or (anchor in lifter.partial and isinstance(end, int) and end >= experts):
        return None
    for instr in lifter.graph.instrs:
        if instr.word != "counts":
            continue
        size = str(instr.types[0].shape[0])
        found = lifter.lift_result(instr)
        ends = {size, f"Min({experts}, {size})", f"Min({size}, {experts})"}
        if isinstance(found, PerExpert) and found.choice == choice and str(end) in ends:
            return None
    return NoMatch(f"the loop visits {end} of {experts} experts", anchor)


NEW: Mapping[str, Rule] = {
    "carry_int": rule_carry_int,
    "span": rule_span,
    "collect": rule_collect,
    "cat": rule_cat,
    "searchsorted": rule_searchsorted,
    "where": rule_where,
    "scatter_add": rule_scatter_add,
    "index_add": rule_scatter_add,
}

BEFORE: Mapping[str, First] = {
    "take": take_run,
    "clamp_max": clamped_ids,
    "add": number_sum,
    "sub": number_sum,
    **dict.fromkeys(("eq", "ne", "gt", "ge"), compare_run),
    "where_indices": rows_of_flat_mask,
    "nonzero": rows_of_flat_mask,
    "one_hot": flat_one_hot,
    "index": index_run,
    "index_put": write_run,
    "scatter": write_run,
}
