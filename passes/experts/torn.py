"""The sums of one loop are taken out of it together: what stays in a loop may not go on with one that left it.

for e: y[rows0(e)] += …; y[rows1(e)] = f(y)   →   as it was, although the first sum alone is understood
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.ir.graph import Graph, Instr
from moec.ir.match import NoMatch
from moec.passes.dispatch.turns import goes_on, loops_of

GOES_ON = NoMatch("the loop goes on with the sum of its experts' rows, which is not understood as a whole", depth=6)


def torn_out(graph: Graph, result: Graph, found: Mapping[str, Sequence[Instr]]) -> list[str]:
    """The roots, of those replaced between `graph` and `result`, that a loop's rest reads, or that begin with it."""
    loops, turning = loops_of(graph) if found else ({}, set[str]())
    torn: list[str] = []
    for root, instrs in found.items():
        loop = loops.get(root)
        if loop is None:
            continue
        made = {name for instr in instrs for name in instr.results}
        reads = {name for instr in instrs for name in instr.uses} & turning - made - set(found)
        begins = {name for name in reads if loops.get(name) == loop}  # what another loop made is there after it
        if goes_on(result, root, loops, found) or begins:
            torn.append(root)
    return torn
