"""Chunks that Python walked through one by one are a rolled region: rows cut by the numbers of one tensor.

a, b = x.split(counts.tolist())          for e in 0, 1:
y = cat([f(a, W[0]), f(b, W[1])])   →        collect(f(x[start(e):end(e)], W[e]))
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from moec.capture.effects import called_name
from moec.capture.host import SPLITTING
from moec.capture.numbers import numbers_of
from moec.capture.walks import Emit, asserts, roll, walk_of

_M = torch.ops.moec


@dataclass(frozen=True)
class _Cut:
    """rows[R, …] cut into `chunks`, one for each number."""

    node: Node
    rows: Node
    chunks: tuple[Node, ...]


def roll_chunks(gm: GraphModule, taken: frozenset[Node]) -> None:
    """Put a region in the place of each walk over chunks that does not stand in one already (`taken`)."""
    graph = gm.graph
    for counts, numbers in numbers_of(graph).items():
        cuts = tuple(cut for node in graph.nodes if (cut := _cut(node, numbers)) is not None)
        walk = walk_of(graph, tuple(cut.chunks for cut in cuts)) if cuts else None
        if walk is None or not taken.isdisjoint(walk.bodies[0]):
            continue
        roll(graph, walk, lambda emit, counts=counts, cuts=cuts: _spans(emit, counts, cuts))
        for cut in cuts:
            graph.erase_node(cut.node)
        _forget(graph, numbers)


def _spans(emit: Emit, counts: Node, cuts: tuple[_Cut, ...]) -> tuple[Node, list[Node]]:
    """The region's item, and its rows of everything that was cut."""
    held = counts.meta["example_value"]
    ends = emit(torch.cumsum, counts, 0)
    item = emit(_M.anchor_range.default, 0, len(cuts[0].chunks), 1, held.device)
    stop = emit(_M.take.default, ends, item)
    start = emit(operator.sub, stop, emit(_M.take.default, counts, item))
    first = cuts[0].chunks[0].meta["example_value"]
    assert isinstance(held, FakeTensor)
    with held.fake_mode:
        places = torch.empty((first.shape[0],), dtype=torch.int64, device=held.device)
    span = emit(_M.span.default, start, stop, like=places)
    return item, [emit(operator.getitem, cut.rows, span, like=cut.chunks[0].meta["example_value"]) for cut in cuts]


def _cut(node: Node, numbers: tuple[Node, ...]) -> _Cut | None:
    """`rows.split(numbers)` of which only the chunks are read."""
    if called_name(node) not in SPLITTING:
        return None
    named = dict(zip(("rows", "sizes", "dim"), node.args, strict=False))
    sizes = named.get("sizes", node.kwargs.get("split_size_or_sections", node.kwargs.get("split_size")))
    rows = named.get("rows")
    if (
        not isinstance(rows, Node)
        or not isinstance(sizes, Sequence)
        or named.get("dim", node.kwargs.get("dim", 0)) != 0
    ):
        return None
    found = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    chunks = [found[i] for i in range(len(numbers)) if i in found]
    if tuple(sizes) != numbers or not len(chunks) == len(node.users) == len(numbers):
        return None
    return _Cut(node, rows, tuple(chunks))


def _forget(graph: Graph, numbers: tuple[Node, ...]) -> None:
    """Remove what only says that numbers are none below zero, or add up to the rows; unless something else reads them.

    A region cuts rows where a walk did; that the counts are those of its rows is for who understands it to see.
    """
    about = dict.fromkeys(numbers)
    for node in graph.nodes:
        if any(arg in about for arg in node.all_input_nodes):
            about[node] = None
    for node in about:
        number = not isinstance(node.meta.get("example_value"), torch.Tensor) and node.op != "output"
        if not (asserts(node) or number):
            return
    for node in reversed(about):
        graph.erase_node(node)
