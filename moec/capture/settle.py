"""The backend's first step on a graph: every rolled region is whole, or Dynamo traces its loop again as written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import GraphModule

from moec.capture.chunks import roll_chunks
from moec.capture.numbers import drop_unread
from moec.capture.region import Malformed, hoist_invariants, regions
from moec.capture.state import Loops, NotRolled, current_tx, declined, loops_of, retrace_all, retrace_without
from moec.capture.unrolled import roll_unrolled

_T = TypeVar("_T")


def settle(gm: GraphModule) -> tuple[NotRolled, ...]:
    """Tidy the regions of a graph that Dynamo hands over, and tell which loops gave up in this compile, and why.

    To be called by the backend, inside its call by Dynamo, before anything else. A graph break inside a rolled
    body leaves half a region behind, and a value of an iteration may escape the loop; then this restarts the
    analysis with that loop as it was written (the exception belongs to Dynamo: let it pass).
    """
    tx = current_tx()
    if tx is None:
        for region in regions(gm):
            hoist_invariants(gm.graph, region)
        return ()
    loops = loops_of(tx)
    if loops.open is not None:
        retrace_without(tx, loops.open, "Dynamo broke the graph inside the loop's body")
    found = regions(gm)
    taken = frozenset(node for region in found for node in (region.anchor, *region.nodes))
    if loops.handed:
        _or_as_written(tx, loops, lambda: roll_chunks(gm, taken))
    if loops.handed and drop_unread(gm):
        retrace_all(
            tx, loops.handed, "numbers that it moves to the host are read elsewhere than in a loop over experts"
        )
    top = [key for key in loops.begun if key not in loops.nested]
    for key, region in zip(top, found, strict=False):
        try:
            hoist_invariants(gm.graph, region)
        except Malformed as error:
            retrace_without(tx, key, str(error))
    if not _or_as_written(tx, loops, lambda: roll_unrolled(gm, taken)) and loops.asked:
        retrace_all(tx, loops.asked, "rows that it lists are read in another way than by experts that are alike")
    gm.recompile()
    _settle_nested(tx, gm, loops.nested)
    return tuple(declined(tx).values())


def _or_as_written(tx: Any, loops: Loops, roll: Callable[[], _T]) -> _T:
    """What `roll` gives; where it fails, a bug in moec, Dynamo traces the functions that moec changed as written."""
    try:
        return roll()
    except Exception as error:
        keys = [*loops.handed, *loops.asked]
        if not keys:
            raise
        reason = f"internal error: {type(error).__name__}: {error}"
    warnings.warn(f"moec: a loop is left as it was written: {reason}", RuntimeWarning, stacklevel=2)
    retrace_all(tx, keys, reason)


def _settle_nested(tx: Any, gm: GraphModule, keys: list[str]) -> None:
    for inner in nested_graphs(gm):
        try:
            for region in regions(inner):
                hoist_invariants(inner.graph, region)
        except Malformed as error:
            retrace_all(tx, keys, str(error))
        inner.recompile()


def nested_graphs(gm: GraphModule) -> list[GraphModule]:
    """The graphs that a graph's higher-order operators run."""
    return [m for m in gm.modules() if isinstance(m, GraphModule) and m is not gm]


def no_loops_left(gm: GraphModule) -> None:
    """To be called by the backend when it has rewritten the graphs: where a higher-order operator's graph still holds
    a region, which cannot run there, its loops are traced again as they were written.
    """
    tx = current_tx()
    if tx is not None and any(regions(inner) for inner in nested_graphs(gm)):
        retrace_all(tx, loops_of(tx).nested, "it stands inside a checkpointed block and its experts are not fused")
