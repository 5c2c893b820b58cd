"""Find where experts' rows come together: y[t] = Σ_s row[t, s], in each way that sum is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.ir.graph import Arg, Dim, Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.dispatch.every import added_rows
from moec.passes.dispatch.index_rules import row_ids
from moec.passes.dispatch.thresholds import table_axes
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.lift import Lift, Lifter
from moec.passes.rows.rows import Apply, Ids, Rows, Slot, Space
from moec.passes.rows.token_axes import as_token, base_of, is_token, names_once, one_expert


@dataclass(frozen=True)
class Combined:
    """A sum over slots found at `root`.

    row    what each (token, slot) contributes          base  a value that the sum is added to; '' when it starts at 0
    form   the spelling: loop | hit_loop | grouped | gathered | dense
    over   what tokens that no expert writes keep, where rows are written over it
    """

    root: str
    rows: Rows
    form: str
    base: str = ""
    over: str = ""


OF_ROWS = frozenset({"reduce_sum", "index_add", "index_put", "scatter_add", "contract"})
COMBINING = OF_ROWS | {"add", "index"}


def combined(lifter: Lifter, instr: Instr) -> Combined | NoMatch:
    """Whether `instr` sums experts' rows into tokens."""
    if instr.word == "reduce_sum":
        return _over_slots(lifter, instr)
    if instr.word == "contract":
        return _weighted(lifter, instr)
    if instr.word == "add":
        return _of_every_token(lifter, instr)
    if instr.word == "index":
        return _put_back(lifter, instr)
    return _into_tokens(lifter, instr)


def _of_every_token(lifter: Lifter, instr: Instr) -> Combined | NoMatch:
    """y + r in a loop, where r is zero but at the rows of the loop's expert."""
    found = added_rows(lifter, instr)
    if found is None:
        return NoMatch("not a sum over tokens")
    base, rows = found
    return Combined(instr.results[0], rows, form_of(lifter.graph, rows), _start(lifter, base))


def _put_back(lifter: Lifter, instr: Instr) -> Combined | NoMatch:
    """rows[order of their tokens], of a loop's rows put together, one a token."""
    rows = lifter.lift_result(instr)
    if not isinstance(rows, Rows) or not rows.anchor or rows.space.kind != "slots" or rows.layout != "flat":
        return NoMatch("not rows that are put back")
    if instr.types[0].rank != 2 or not one_expert(lifter.graph, rows.choice):
        return NoMatch("not a row for each token")
    return Combined(instr.results[0], rows, form_of(lifter.graph, rows))


def _over_slots(lifter: Lifter, instr: Instr) -> Combined | NoMatch:
    """rows[T, k, H].sum(1); rows[E, T, H].sum(0)."""
    source = lifter.type(instr.args[0])
    dims = instr.attr("dims")
    if source.rank != 3 or dims not in ((0,), (1,)):
        return NoMatch("not a sum over slots or experts")
    rows = lifter.lift(instr.args[0])
    if isinstance(rows, NoMatch):
        return rows
    one = isinstance(rows, Rows) and rows.layout == "flat" and rows.space == Space("slots", 1) and source.shape[1] == 1
    if isinstance(rows, Rows) and ((rows.layout, dims) in (("tk", (1,)), ("et", (0,))) or (one and dims == (1,))):
        return Combined(instr.results[0], rows, form_of(lifter.graph, rows))
    return NoMatch("not a sum over slots or experts")


def _weighted(lifter: Lifter, instr: Instr) -> Combined | NoMatch:
    """einsum("tk,tkh->th", w, rows) and its batched-matmul spelling."""
    (left, right), out = equation_of(instr)
    w, x = instr.args
    w, left, out = _narrow(lifter, w, left, right, out)
    x, right, out = _narrow(lifter, x, right, left, out)
    if len(left) > len(right):
        w, x, left, right = x, w, right, left
    if not isinstance(w, Ref) or (len(left), len(right), len(out)) != (2, 3, 2):
        return NoMatch("not a weighted sum over slots")
    rows = lifter.lift(x)
    if not isinstance(rows, Rows):
        return rows if isinstance(rows, NoMatch) else NoMatch("not a weighted sum over slots")
    if rows.layout != "tk" or right[:2] != left or out != left[0] + right[2]:
        return NoMatch("not a weighted sum over slots")
    rows = replace(rows, row=Apply("mul", (rows.row, Slot(w.name))))
    return Combined(instr.results[0], rows, form_of(lifter.graph, rows))


def _narrow(lifter: Lifter, arg: Arg, letters: str, others: str, out: str) -> tuple[Arg, str, str]:
    """w[T, k] of w[T, 1, k], given that axis for a product that keeps it; its letters and the result's without it."""
    made, shape = lifter.instr(arg), lifter.type(arg).shape
    if made is None or made.word != "reshape" or len(letters) != 3:
        return arg, letters, out
    source = lifter.type(made.args[0]).shape
    for axis, letter in enumerate(letters):
        kept = shape[:axis] + shape[axis + 1 :] == source
        if shape[axis] == 1 and kept and letter in out and letter not in others:
            return made.args[0], letters[:axis] + letters[axis + 1 :], out.replace(letter, "")
    return arg, letters, out


def _into_tokens(lifter: Lifter, instr: Instr) -> Combined | NoMatch:
    """y.index_add(0, token, rows); y[token] += rows."""
    once = False
    if instr.attr("dim") != 0:
        return NoMatch("adds along another axis than tokens")
    if instr.word == "index_put":
        base, source, *ids = instr.args
        index = _token_ids(lifter, tuple(ids))
        added = lifter.lift(source) if instr.attr("accumulate") else _added(lifter, base, source, tuple(ids))
        if not instr.attr("accumulate") and isinstance(added, Rows) and _may_repeat(lifter.graph, index):
            return NoMatch("a token may choose an expert twice, and is added to once", instr.results[0], 2)
        once = isinstance(added, NoMatch) and _writes_once(lifter, index)
        if once and _is_written(lifter, base):
            return NoMatch("overwrites rows that the same turn wrote", instr.results[0])
        if once:
            added = lifter.lift(source)
    elif instr.word == "scatter_add":
        base, wide, source = instr.args
        index, added = row_ids(lifter, wide), lifter.lift(source)
    else:
        base, narrow, source = instr.args
        index, added = lifter.lift(narrow), lifter.lift(source)
    for found in (index, added):
        if isinstance(found, NoMatch):
            return found
    index = as_token(lifter.graph, index) if isinstance(index, Ids) else index
    if not isinstance(index, Ids) or index.what != "token" or not isinstance(added, Rows):
        return NoMatch("adds something else than rows to tokens", instr.results[0])
    a, b = index.space, added.space
    if (a.same_rows, index.layout) != (b.same_rows, added.layout):
        return NoMatch("rows and tokens are in different orders", instr.results[0])
    adds = once or instr.word != "index_put" or instr.attr("accumulate") or index.space.kind == "loop"
    if not adds and index.space.k != 1:
        return NoMatch("the last of a token's rows overwrites the others", instr.results[0])
    added = replace(added, choice=added.choice or index.choice)
    start, form = _start(lifter, base, once), form_of(lifter.graph, added)
    return Combined(instr.results[0], added, form, "" if once else start, start if once else "")


def _token_ids(lifter: Lifter, ids: tuple[Arg, ...]) -> Lift:
    """The tokens that indices name: one, or one for each axis of the tokens."""
    found = [lifter.lift(i) for i in ids]
    first = found[0]
    misses = [f for f in found if isinstance(f, NoMatch)]
    if misses or len(ids) == 1 or not isinstance(first, Ids):
        return misses[0] if misses else first
    rows = [f for f in found if isinstance(f, Ids) and (f.space, f.choice) == (first.space, first.choice)]
    what = tuple(f.what for f in rows)
    known = is_token(lifter.graph, first.choice, what) or what == table_axes(lifter, first.choice)
    if len(rows) != len(found) or not known:
        return NoMatch("writes at more than one index")
    return replace(first, what="token")


def _added(lifter: Lifter, base: object, source: object, ids: tuple[Arg, ...]) -> Lift:
    """The rows r in `y[i] = y[i] + r`."""
    made = lifter.instr(lifter.graph.behind(source, ("same", "cast"))) if isinstance(source, Ref) else None
    if made is None or made.word != "add":
        return NoMatch("overwrites tokens instead of adding to them")
    for old, new in (made.args, made.args[::-1]):
        gathered = lifter.instr(old)
        if gathered is not None and gathered.word == "index" and gathered.args == (base, *ids):
            return lifter.lift(new)
    return NoMatch("adds to other rows than it writes")


def _may_repeat(graph: Graph, index: Lift) -> bool:
    """Whether a token may come twice among an expert's rows, since nothing is known of the choice but its slots."""
    choice = base_of(index.choice) if isinstance(index, Ids) else ""
    if not isinstance(index, Ids) or "s" not in index.space.order or choice not in graph.types:
        return False
    given = graph.behind(Ref(choice), ("cast", "same", "detach", "reshape"))
    return isinstance(given, Ref) and given.name not in graph.defs and not names_once(graph, choice)


def _writes_once(lifter: Lifter, index: Lift) -> bool:
    """Whether a loop, or what it collected, writes each token's row once: each token has one expert."""
    if not isinstance(index, Ids) or index.what != "token":
        return False
    if index.space.kind != "loop" and not (index.space.kind == "sorted" and index.space.order):
        return False
    return one_expert(lifter.graph, index.choice)


def _is_written(lifter: Lifter, base: Arg) -> bool:
    """Whether rows were put into what is written: a token's other expert may have given them."""
    made = lifter.instr(lifter.graph.behind(base, ("same", "cast")))
    return made is not None and made.word in ("index_put", "index_add", "scatter_add")


def chosen_of(graph: Graph, choice: str) -> Dim | None:
    """Of how many experts each token has one for certain; None where that cannot be seen."""
    found = graph.behind(Ref(choice), ("cast", "same", "detach", "reshape", "slice"))
    made = graph.defs.get(found.name) if isinstance(found, Ref) else None
    if made is None or made.word not in ("max", "argmax", "topk"):
        return None
    axis = made.attr("dim")
    return graph.types[made.uses[0]].shape[axis] if isinstance(axis, int) else None


def _start(lifter: Lifter, base: object, empty: bool = False) -> str:
    """'' when the sum starts from zeros (or, where all rows are written, from nothing), else what it starts from."""
    assert isinstance(base, Ref)
    first = lifter.graph.behind(base, ("carry",))
    assert isinstance(first, Ref)
    made = lifter.instr(lifter.graph.behind(first, ("reshape", "same", "cast")))
    zeros = made is not None and made.word == "full" and made.attr("value") in ((0.0, None) if empty else (0.0,))
    return "" if zeros else first.name


def form_of(graph: Graph, rows: Rows) -> str:
    """The spelling, in DESIGN's words."""
    if rows.space.kind != "loop":
        return {"sorted": "grouped", "slots": "gathered", "dense": "dense"}[rows.via or rows.space.kind]
    anchor = graph.defs[rows.space.key]
    return "hit_loop" if anchor.word == "anchor" else "loop"
