"""The backend's first step on a graph: every rolled region is whole, or Dynamo traces its loop again as written."""

from __future__ import annotations

from torch.fx import GraphModule

from moec.capture.region import Malformed, hoist_invariants, regions
from moec.capture.state import NotRolled, current_tx, declined, loops_of, retrace_without


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
    for key, region in zip(loops.begun, regions(gm), strict=True):
        try:
            hoist_invariants(gm.graph, region)
        except Malformed as error:
            retrace_without(tx, key, str(error))
    gm.recompile()
    return tuple(declined(tx).values())
