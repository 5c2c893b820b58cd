"""Rows that are read back where they were just written are what was written there.

y = index_put(y0, v, rows); index(y, rows)       →   v
index_put(index_put(y0, v, rows), u, rows)       →   index_put(y0, u, rows)

Only places of a mask, none of which comes twice: where a row is written twice, one of them is lost.
"""

from __future__ import annotations

from moec.ir.graph import Arg, Instr, Ref
from moec.passes.canonical.rewriter import Rewriter, again


def rule_read(state: Rewriter, instr: Instr) -> Ref | None:
    """The rows that were written, where the same rows are read."""
    if instr.word != "index" or instr.attr("dim") != 0:
        return None
    put = _written(state, instr.args[0], instr.args[1:])
    value = put.args[1] if put is not None else None
    return value if isinstance(value, Ref) and state.type(value) == instr.types[0] else None


def rule_write(state: Rewriter, instr: Instr) -> Instr | None:
    """Rows that are written over are not written."""
    if instr.word != "index_put" or instr.attr("accumulate"):
        return None
    put = _written(state, instr.args[0], instr.args[2:])
    return None if put is None else again(instr, "index_put", (put.args[0], *instr.args[1:]), **dict(instr.attrs))


def _written(state: Rewriter, arg: Arg, ids: tuple[Arg, ...]) -> Instr | None:
    """The instruction that wrote a tensor's rows at these places, each once."""
    put = state.by(arg, "index_put")
    if put is None or put.attr("accumulate") or put.attr("dim") != 0 or len(put.args) != len(ids) + 2:
        return None
    same = all(_place(state, a) == _place(state, b) is not None for a, b in zip(put.args[2:], ids, strict=True))
    return put if same and _whole(state, ids) else None


def _place(state: Rewriter, arg: Arg) -> tuple[Arg, int] | None:
    """The mask, and the axis of it, whose places an index is."""
    made = state.by(arg, "where_indices")
    if made is not None and isinstance(arg, Ref):
        return made.args[0], made.results.index(arg.name)
    view = state.by(arg, "reshape")
    listed = state.by(view.args[0], "nonzero") if view is not None and state.type(arg).rank == 1 else None
    return (listed.args[0], 0) if listed is not None and state.type(listed.args[0]).rank == 1 else None


def _whole(state: Rewriter, ids: tuple[Arg, ...]) -> bool:
    """Whether indices are a mask's places along all of its axes, so that no place comes twice."""
    places = [_place(state, arg) for arg in ids]
    masks = {place[0] for place in places if place is not None}
    rank = state.type(next(iter(masks))).rank if len(masks) == 1 else -1
    return sorted(place[1] for place in places if place is not None) == list(range(rank))
