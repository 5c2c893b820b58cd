"""Chains of additions: which is a step of a longer sum, and which is whole."""

from __future__ import annotations

from moec.ir.graph import Graph, Instr, Ref

APART = "apart"
"""Says of an addition that it is a whole sum of experts' rows, though another addition reads it."""


def part_of_sum(graph: Graph, instr: Instr) -> bool:
    """Whether an addition is only a step of a longer one, which reads it once: y + y is no sum of all that y adds."""
    name, users = instr.results[0], graph.users.get(instr.results[0], ())
    if instr.word != "add" or APART in dict(instr.attrs) or len(users) != 1 or name in graph.outputs:
        return False
    return users[0].word == "add" and users[0].types == instr.types and users[0].args.count(Ref(name)) == 1
