"""The rolled regions of a graph: what lies between an anchor and its end runs once for each item, in order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Graph, GraphModule, Node

from moec.capture import ops as _ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  # registers
from moec.capture.effects import only_asks, root, viewed, written

_M = torch.ops.moec
ANCHORS = (_M.anchor.default, _M.anchor_range.default)
SKIPS = (_M.skip.default, _M.skip_size.default)
CARRIES = (_M.carry.default, _M.carry_int.default)


class Malformed(Exception):
    """A region that no loop can stand for; capture then traces the loop as it was written."""


@dataclass(frozen=True)
class Region:
    """A rolled loop: for each item that `anchor` stands for, run `nodes` in order.

    A skip ends the iteration where its condition holds. `accumulators` are the tensors of the outside that the
    body writes to in place, by the nodes in `effects`. `carries` pairs each `carry` with its `yield_`, which hands the
    next value over where it stands; the results of `yield_` and `collect`, and nothing else of the region, are used
    after it.
    """

    anchor: Node
    end: Node
    nodes: tuple[Node, ...]

    @property
    def over_range(self) -> bool:
        """Whether the items are those of a range; otherwise they are the rows of `anchor.args[0]`."""
        return self.anchor.target is _M.anchor_range.default

    @cached_property
    def members(self) -> frozenset[Node]:
        """The nodes of the body, with the anchor."""
        return frozenset((self.anchor, *self.nodes))

    @cached_property
    def skips(self) -> tuple[Node, ...]:
        """The nodes that may end an iteration."""
        return tuple(node for node in self.nodes if node.target in SKIPS)

    @cached_property
    def carries(self) -> tuple[tuple[Node, Node], ...]:
        """Each loop-carried value: where it enters an iteration and where it leaves."""
        yields = {node.args[0]: node for node in self.nodes if node.target is _M.yield_.default}
        return tuple((node, yields[node]) for node in self.nodes if node.target in CARRIES)

    @cached_property
    def collects(self) -> tuple[Node, ...]:
        """The nodes whose rows, of all iterations, are one tensor after the loop."""
        return tuple(node for node in self.nodes if node.target is _M.collect.default)

    @cached_property
    def effects(self) -> tuple[Node, ...]:
        """The nodes that write to tensors of the outside."""
        return tuple(n for n in self.nodes if any(root(t) not in self.members for t in written(n)))

    @cached_property
    def accumulators(self) -> tuple[Node, ...]:
        """The tensors of the outside that the body writes to, each once."""
        roots = (_outside(t, self.members) for n in self.effects for t in written(n) if root(t) not in self.members)
        return tuple(dict.fromkeys(roots))

    @cached_property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes of the outside that the body or its anchor reads, each once, in order of use."""
        reads = (a for node in (self.anchor, *self.nodes) for a in node.all_input_nodes if a not in self.members)
        return tuple(dict.fromkeys(reads))

    @cached_property
    def dependent(self) -> frozenset[Node]:
        """The nodes whose values may differ from one iteration to the next."""
        found = {self.anchor}
        changing = {root(a) for a in self.accumulators}
        for node in self.nodes:
            carried = node.target in CARRIES
            if (
                carried
                or node in self.effects
                or any(self._changes(a, node, found, changing) for a in node.all_input_nodes)
            ):
                found.add(node)
        return frozenset(found)

    def _changes(self, arg: Node, node: Node, found: set[Node], changing: set[Node]) -> bool:
        return arg in found or (root(arg) in changing and not only_asks(node))


def _outside(node: Node, members: frozenset[Node]) -> Node:
    """The first tensor of the outside on the way from a view to its owner."""
    while node in members:
        base = viewed(node)
        if base is None:
            return node
        node = base
    return node


def regions(gm: GraphModule) -> tuple[Region, ...]:
    """The regions of a graph, in order; raises Malformed where markers do not pair up."""
    found: list[Region] = []
    anchor: Node | None = None
    nodes: list[Node] = []
    for node in gm.graph.nodes:
        if node.target in ANCHORS:
            if anchor is not None:
                raise Malformed(f"{node.name} begins inside the region of {anchor.name}")
            anchor, nodes = node, []
        elif node.target is _M.end.default:
            if anchor is None:
                raise Malformed(f"{node.name} ends a region that did not begin")
            found.append(Region(anchor, node, tuple(nodes)))
            anchor = None
        elif anchor is not None and node.op not in ("placeholder", "get_attr"):
            nodes.append(node)
    if anchor is not None:
        raise Malformed(f"the region of {anchor.name} does not end")
    return tuple(found)


def hoist_invariants(graph: Graph, region: Region) -> Region:
    """Move what does not depend on the item, and is used after the region, to the front; raises Malformed.

    Dynamo records the sizes of a tensor where they are first asked for, which may be inside the body.
    """
    if any(arg in region.collects for n in region.nodes if _leaks(n, region) for arg in n.all_input_nodes):
        region = _ask_behind(region)
    yields = {*region.collects, *(leave for _, leave in region.carries)}
    leaked = [
        n
        for n in region.nodes
        if n not in yields and any(u not in region.members and u is not region.end for u in n.users)
    ]
    moving: set[Node] = set()
    todo = list(leaked)
    while todo:
        node = todo.pop()
        if node in moving:
            continue
        if node in region.dependent or written(node):
            raise Malformed(f"{node.name} depends on the loop's item and is used after the loop")
        moving.add(node)
        todo += [a for a in node.all_input_nodes if a in region.members]
    for node in region.nodes:
        if node in moving:
            region.anchor.prepend(node)
    return Region(region.anchor, region.end, tuple(n for n in region.nodes if n not in moving))


def _leaks(node: Node, region: Region) -> bool:
    """Whether something behind the region reads a node."""
    return any(user not in region.members and user is not region.end for user in node.users)


def _ask_behind(region: Region) -> Region:
    """The region with what is asked of rows of all iterations alone, as their number, behind its end."""
    asks: dict[Node, None] = {}
    for node in region.nodes:
        inside = [arg for arg in node.all_input_nodes if arg in region.members]
        if inside and not written(node) and all(arg in asks or arg in region.collects for arg in inside):
            asks[node] = None
    for node in reversed(region.nodes):
        if any(user in region.members and user not in asks for user in node.users):
            asks.pop(node, None)
    for node in reversed(asks):
        region.end.append(node)
    return Region(region.anchor, region.end, tuple(node for node in region.nodes if node not in asks))
