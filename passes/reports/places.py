"""Where in the user's code a value stands: at its own line, or at the nearest line before or behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from moec.ir.graph import Graph, Instr


def place(graph: Graph, *values: str) -> str:
    """`file:line` of the first value that has one; '' only where nothing around any of them has a line.

    What moec or Dynamo made, and inputs, have no line of their own: the nearest value that they are made from stands
    for them, else the nearest that is made from them.
    """
    for near in (_own, _makers, _readers):
        for value in values:
            found = _nearest(value, lambda name, near=near: near(graph, name))
            if found:
                return found
    return ""


def _own(graph: Graph, name: str) -> tuple[str, Iterable[str]]:
    made = graph.defs.get(name)
    return (made.loc if made is not None else ""), ()


def _makers(graph: Graph, name: str) -> tuple[str, Iterable[str]]:
    made = graph.defs.get(name)
    return (made.loc, made.uses) if made is not None else ("", ())


def _readers(graph: Graph, name: str) -> tuple[str, Iterable[str]]:
    users: tuple[Instr, ...] = tuple(graph.users.get(name, ()))
    line = next((user.loc for user in users if user.loc), "")
    return line, (result for user in users for result in user.results)


def _nearest(start: str, step: Callable[[str], tuple[str, Iterable[str]]]) -> str:
    """The first line in the order of distance."""
    layer, seen = [start], {start}
    while layer:
        further: list[str] = []
        for name in layer:
            line, more = step(name)
            if line:
                return line
            further.extend(more)
        layer = [name for name in dict.fromkeys(further) if name not in seen]
        seen.update(layer)
    return ""
