"""What a rolled loop computes in each of its turns, and whether it reads again what it has computed.

y[rows(e)] = f(x[rows(e)]); y[rows(e)] = y[rows(e)] * g(e): the second line reads the first one's sum in the same turn
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from moec.ir.graph import EFFECTS, Graph

_ENDS = frozenset({"turn", "end"})
_TURNING = EFFECTS | {"anchor", "anchor_range", "carry", "carry_int"}


def goes_on(graph: Graph, root: str, loops: Mapping[str, str], found: Collection[str] = ()) -> bool:
    """Whether the loop that a value is computed in reads it again, other than by a value of `found`."""
    users = (user for user in graph.users.get(root, ()) if user.word not in _ENDS and user.results)
    loop = loops.get(root)
    return loop is not None and any(u.results[0] not in found and loops.get(u.results[0]) == loop for u in users)


def turns_in(graph: Graph, name: str, anchor: str) -> bool:
    """Whether a value is computed in the turns of a rolled loop, not behind it."""
    ends = [graph.position[user.results[0]] for user in graph.users.get(anchor, ()) if user.word in _ENDS]
    return graph.position[anchor] < graph.position[name] < max(ends, default=-1)


def same_each_turn(graph: Graph, name: str, anchor: str) -> bool:
    """Whether a value is that of before the loop in each of its turns, though the turns may compute it again."""
    seen, pending = {name}, [name]
    while pending:
        value = pending.pop()
        made = graph.defs.get(value)
        if made is None or graph.position[value] < graph.position[anchor]:
            continue
        if made.word in _TURNING:
            return False
        more = set(made.uses) - seen
        seen |= more
        pending += more
    return True


def loops_of(graph: Graph) -> tuple[dict[str, str], set[str]]:
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
