"""The sums of one loop are taken out of it together: what stays in a loop may not go on with one that left it.

for e: y[rows0(e)] += …; y[rows1(e)] = f(y)   →   as it was, although the first sum alone is understood
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.ir.graph import Graph, Instr
from moec.ir.match import NoMatch

GOES_ON = NoMatch("the loop goes on with the sum of its experts' rows, which is not understood as a whole", depth=6)

_ENDS = frozenset({"turn", "end"})


def torn_out(graph: Graph, result: Graph, found: Mapping[str, Sequence[Instr]]) -> list[str]:
    """The roots, of those replaced between `graph` and `result`, that a loop's rest reads, or that begin with it."""
    loops, turning = _loops(graph) if found else ({}, set[str]())
    torn: list[str] = []
    for root, instrs in found.items():
        loop = loops.get(root)
        if loop is None:
            continue
        users = (user for user in result.users.get(root, ()) if user.word not in _ENDS and user.results)
        goes_on = any(u.results[0] not in found and loops.get(u.results[0]) == loop for u in users)
        made = {name for instr in instrs for name in instr.results}
        begins = {name for instr in instrs for name in instr.uses} & turning - made - set(found)
        if goes_on or begins:
            torn.append(root)
    return torn


def _loops(graph: Graph) -> tuple[dict[str, str], set[str]]:
    """The rolled loop that each value in one is computed in, and the values that differ from turn to turn of theirs."""
    found: dict[str, str] = {}
    turning: set[str] = set()
    own: set[str] = set()
    anchor = ""
    for instr in graph.instrs:
        if instr.word in ("anchor", "anchor_range"):
            anchor, own = instr.results[0], set(instr.results)
        if anchor:
            found.update(dict.fromkeys(instr.results, anchor))
            if instr.word in ("carry", "carry_int") or not own.isdisjoint(instr.uses):
                own.update(instr.results)
        if instr.word == "end":
            turning |= own
            anchor = ""
    return found, turning
