"""Experts whose rows Python asked for one by one, `rows[e] = where(choice == e)`, are a rolled region.

r0 = where(c == 0); r1 = where(c == 1); …          for e in region:
a0 = f(x[r0], W[0]); a1 = f(x[r1], W[1]); …   →        r = where(c == e)
y[r0] = a0; y[r1] = a1; …                              y[r] = f(x[r], W[e])

In whichever lists they were held, and in however many loops. Numbers of rows that were put into a tensor are counts.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moec.capture.effects import called_name
from moec.capture.walks import Emit, Roots, emitter, roll, walk_of

_M = torch.ops.moec
_MADE = frozenset(("tensor", "new_tensor"))


def roll_unrolled(gm: GraphModule, taken: frozenset[Node]) -> bool:
    """Put a region in the place of bodies that Dynamo wrote out and that do not stand in one already (`taken`).

    Whether there were such.
    """
    graph, done = gm.graph, False
    for choice, roots in _asked(graph).items():
        if not taken.isdisjoint(node for group in roots for node in group):
            continue
        _count(graph, choice, roots)
        walk = walk_of(graph, roots)
        if walk is None or not any(_by_data(node) for node in walk.bodies[0]):
            continue
        roll(graph, walk, lambda emit, choice=choice, roots=roots: _masks(emit, choice, roots))
        done = True
    return done


def _asked(graph: Graph) -> dict[Node, Roots]:
    """The whole numbers that are compared with 0, 1, … up to some expert, each as often; with these comparisons."""
    found: dict[Node, dict[int, list[Node]]] = {}
    for node in graph.nodes:
        if called_name(node) != "eq" or len(node.args) != 2 or node.kwargs:
            continue
        choice, expert = node.args
        if isinstance(choice, Node) and type(expert) is int and _whole(choice):
            found.setdefault(choice, {}).setdefault(expert, []).append(node)
    groups: dict[Node, Roots] = {}
    for choice, asked in found.items():
        each = [asked.get(expert, []) for expert in range(len(asked))]
        if len(each) > 1 and each[0] and len({len(nodes) for nodes in each}) == 1:
            groups[choice] = tuple(zip(*each, strict=True))
    return groups


def _whole(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool and value.dim() > 0


def _by_data(node: Node) -> bool:
    """Whether only data say how large a value is: rows were asked for."""
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and bool(free_unbacked_symbols(value))


def _masks(emit: Emit, choice: Node, roots: Roots) -> tuple[Node, list[Node]]:
    """The region's item, and who chose it."""
    device = choice.meta["example_value"].device
    item = emit(_M.anchor_range.default, 0, len(roots[0]), 1, device)
    return item, [emit(operator.eq, choice, item, like=group[0].meta["example_value"]) for group in roots]


def _count(graph: Graph, choice: Node, roots: Roots) -> None:
    """Put counts of the choices in the place of tensors that were made of each expert's number of rows."""
    place = {node: i for group in roots for i, node in enumerate(group)}
    for node in list(graph.nodes):
        if called_name(node) not in _MADE:
            continue
        numbers: Any = next((arg for arg in node.args if isinstance(arg, list | tuple)), ())
        asked = [place.get(_mask_of(number), -1) for number in numbers]
        if asked != list(range(len(roots[0]))):
            continue
        value, emit = node.meta["example_value"], emitter(graph, node, node)
        every = emit(torch.arange, len(asked), device=value.device)
        same = emit(operator.eq, emit(torch.reshape, choice, (-1, 1)), every)
        node.replace_all_uses_with(emit(torch.sum, same, 0, dtype=value.dtype))
        graph.erase_node(node)


def _mask_of(number: Any) -> Any:
    """The mask of which a number is the number of places where it is true."""
    if not isinstance(number, Node) or "size" not in str(number.target) or number.args[1:] != (0,):
        return None
    places: Any = number.args[0]
    if isinstance(places, Node) and places.target is operator.getitem and places.args[1] == 0:
        places = places.args[0]
    if not isinstance(places, Node) or len(places.args) != 1 or called_name(places) not in ("nonzero", "where"):
        return None
    return places.args[0]
