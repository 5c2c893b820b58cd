"""What Dynamo wrote out for each expert, one after the other, as one rolled region.

f(r0, W[0]); f(r1, W[1]); … ; cat([…])    →    for e in region: collect(f(root(e), W[e]))

Whatever Python held in between (lists, dictionaries, objects), the graph has one body for each root; what it did for
each expert is compared node by node with what it did for the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moec.capture.effects import root, written

_M = torch.ops.moec
_JOINING = frozenset(("cat", "concat", "concatenate"))
_ASSERTING = frozenset(("_assert_scalar", "_check", "sym_constrain_range", "sym_constrain_range_for_size"))

_CONTEXT = ("_set_", "_enter_", "_exit_")

Roots = tuple[tuple[Node, ...], ...]
"""Groups of nodes, each with one for every expert, in order."""
Emit = Callable[..., Node]
"""Writes a node: its target, its arguments, and `like`, its value where that is known."""


@dataclass(frozen=True)
class Walk:
    """One body for every expert, and where all of them meet.

    bodies  for each expert, its nodes in order
    joins   the nodes that join one result of each, in order
    given   what the first body reads from outside, with what stands for it in every body
    silent  the nodes that only say something of sizes
    """

    roots: Roots
    bodies: tuple[tuple[Node, ...], ...]
    joins: tuple[Node, ...]
    given: dict[Node, tuple[Node, ...]]
    silent: tuple[Node, ...]


def walk_of(graph: Graph, roots: Roots) -> Walk | None:
    """The bodies behind some roots; None where they differ, or meet in anything but joins and writes."""
    owner = {node: place for group in roots for place, node in enumerate(group)}
    silent = _silent(graph)
    joins: list[Node] = []
    bodies: list[list[Node]] = [[] for _ in roots[0]]
    for node in graph.nodes:
        places = {owner[arg] for arg in node.all_input_nodes if arg in owner}
        if node in owner or not places or node in silent:
            continue
        if len(places) == 1 and node.op != "output":
            owner[node] = places.pop()
            bodies[owner[node]].append(node)
        elif _joins(node, [owner.get(part, -1) for part in parts_of(node)], len(bodies)):
            joins.append(node)
        else:
            return None
    given = _alike(bodies, roots, owner)
    if given is None or not _join_alike(bodies, joins) or not _may_move(graph, bodies, joins, given, roots):
        return None
    left: dict[Node, None] = {}
    for node in graph.nodes:
        if node in silent and any(arg in owner or arg in left for arg in node.all_input_nodes):
            left[node] = None
    return Walk(roots, tuple(map(tuple, bodies)), tuple(joins), given, tuple(left))


def parts_of(node: Node) -> list[Any]:
    """What a node joins."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors", ())
    return list(parts) if isinstance(parts, Sequence) else []


def asserts(node: Node) -> bool:
    """Whether a node only checks something."""
    return node.op == "call_function" and getattr(node.target, "__name__", "").partition(".")[0] in _ASSERTING


def _silent(graph: Graph) -> dict[Node, None]:
    """The nodes that nothing but checks read, with these checks."""
    found: dict[Node, None] = {}
    for node in reversed(graph.nodes):
        told = bool(node.users) and all(user in found for user in node.users)
        if asserts(node) or (told and node.op.startswith("call_") and not written(node)):
            found[node] = None
    return found


def _joins(node: Node, places: list[int], count: int) -> bool:
    """Whether a node joins one result of every body, in order, along the first axis."""
    joining = node.op == "call_function" and getattr(node.target, "__name__", "") in _JOINING
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return joining and type(dim) is int and dim == 0 and places == list(range(count))


def _join_alike(bodies: list[list[Node]], joins: list[Node]) -> bool:
    """Whether each join takes the same result of every body; and none that is a root itself."""
    for join in joins:
        parts = parts_of(join)
        if parts[0] not in bodies[0]:
            return False
        place = bodies[0].index(parts[0])
        if any(part is not body[place] for part, body in zip(parts, bodies, strict=True)):
            return False
    return True


def _alike(bodies: list[list[Node]], roots: Roots, owner: dict[Node, int]) -> dict[Node, tuple[Node, ...]] | None:
    given: dict[Node, list[Node]] = {}
    first = (*(group[0] for group in roots), *bodies[0])
    for place, body in enumerate(bodies):
        if len(body) != len(bodies[0]):
            return None
        pairs = zip(first, (*(group[place] for group in roots), *body), strict=True)
        likeness = _Likeness(place, owner, dict(pairs), given)
        if not all(map(likeness.of_nodes, bodies[0], body)):
            return None
    tables = {a: tuple(held) for a, held in given.items()}
    return tables if all(map(_one_table, tables.values())) else None


@dataclass(frozen=True)
class _Likeness:
    """Whether the body of a place does what the first one does; notes in `given` what it reads from outside.

    owner  the place of each node of a body
    same   the nodes of the first body, with those of this one
    """

    place: int
    owner: dict[Node, int]
    same: dict[Node, Node]
    given: dict[Node, list[Node]]

    def of_nodes(self, a: Node, b: Node) -> bool:
        """Whether one node of each does the same with what is the same."""
        alike = (a.op, a.target) == (b.op, b.target)
        return alike and self.of(a.args, b.args) and self.of(dict(a.kwargs), dict(b.kwargs))

    def of(self, a: Any, b: Any) -> bool:
        """Whether two arguments are the same."""
        if isinstance(a, Node) and isinstance(b, Node):
            return self.same.get(a) is b if a in self.owner else self.outside(a, b)
        if type(a) is not type(b):
            return False
        if isinstance(a, tuple | list):
            return len(a) == len(b) and all(map(self.of, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self.of(a[k], b[k]) for k in a)
        if isinstance(a, slice):
            return self.of((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        return bool(a == b)

    def outside(self, a: Node, b: Node) -> bool:
        """Whether b can be what this place has where the first one has a."""
        if b in self.owner:
            return False
        held = self.given.setdefault(a, [])
        if len(held) == self.place:
            held.append(b)
        return len(held) > self.place and held[self.place] is b


def _one_table(held: tuple[Node, ...]) -> bool:
    """Whether values are one and the same, or tensors of one shape that could be picked from."""
    if all(node is held[0] for node in held):
        return True
    values = [node.meta.get("example_value") for node in held]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    kinds = {(tuple(map(str, t.shape)), t.dtype, t.device, t.requires_grad) for t in tensors}
    return len(kinds) == 1


def _may_move(
    graph: Graph,
    bodies: list[list[Node]],
    joins: list[Node],
    given: dict[Node, tuple[Node, ...]],
    roots: Roots,
) -> bool:
    """Whether all that the bodies do can be done, expert after expert, where the first of them is joined or written."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    own = {node: place for place, body in enumerate(bodies) for node in body}
    changed = {root(target) for node in own for target in written(node)} - own.keys()
    ends = [*joins, *(node for node in own if any(root(target) in changed for target in written(node)))]
    if not ends or any(len(set(given[a])) > 1 for a in given if root(a) in changed):
        return False
    here = min(order[node] for node in ends)
    begun = {arg for group in roots for node in group for arg in node.all_input_nodes}
    if any(order[node] >= here for node in begun.union(*given.values())):
        return False
    touching = [own[node] for node in order if node in own and any(root(a) in changed for a in node.all_input_nodes)]
    begin, end = min(order[node] for group in roots for node in group), max(here, *map(order.__getitem__, own))
    for node, place in order.items():
        if node in own or node in joins or not begin < place < end:
            continue
        if written(node) or _is_context(node) or any(root(arg) in changed for arg in node.all_input_nodes):
            return False
    return touching == sorted(touching)


def _is_context(node: Node) -> bool:
    """Whether a node changes how those behind it run: with gradients or without, in which dtype."""
    return node.op == "call_function" and getattr(node.target, "__name__", "").startswith(_CONTEXT)


def emitter(graph: Graph, before: Node, like_at: Node) -> Emit:
    """What writes nodes before one, as of the line of the user's code where `like_at` stands."""
    mode = next(v.fake_mode for n in graph.nodes if isinstance(v := n.meta.get("example_value"), FakeTensor))

    def emit(target: Any, *args: Any, like: Any = None, **kwargs: Any) -> Node:
        with graph.inserting_before(before):
            node = graph.call_function(target, args, kwargs)
        node.meta["stack_trace"] = like_at.meta.get("stack_trace")
        if like is None:
            with mode:
                like = target(*map_arg(args, lambda arg: arg.meta["example_value"]), **kwargs)
        node.meta["example_value"] = like
        return node

    return emit


def roll(graph: Graph, walk: Walk, begin: Callable[[Emit], tuple[Node, Sequence[Node]]]) -> None:
    """Write the region where the walk's bodies first meet, and remove what it stands for.

    begin: writes the region's head; its item, and what stands for each group of roots.
    """
    body = walk.bodies[0]
    changing = [node for node in body if any(root(target) not in body for target in written(node))]
    here = next(node for node in graph.nodes if node in (*walk.joins, *changing))
    mark = _marker(graph, here)
    emit = emitter(graph, mark, here)
    for node in reversed(walk.silent):
        graph.erase_node(node)
    item, made = begin(emit)
    for group, node in zip(walk.roots, made, strict=True):
        group[0].replace_all_uses_with(node)
    tables = {
        a: a if all(b is a for b in held) else emit(_M.pick.default, list(held), item) for a, held in walk.given.items()
    }
    for node in body:
        node.args = map_arg(node.args, lambda arg: tables.get(arg, arg))
        node.kwargs = map_arg(node.kwargs, lambda arg: tables.get(arg, arg))
        mark.prepend(node)
    joined = [
        (join, emit(_M.collect.default, parts_of(join)[0], item, like=join.meta["example_value"]))
        for join in walk.joins
    ]
    emit(_M.end.default, item, like=())
    for join, collected in joined:
        join.replace_all_uses_with(collected)
        graph.erase_node(join)
    for other in walk.bodies[1:]:
        for node in reversed(other):
            graph.erase_node(node)
    for group in walk.roots:
        for node in group:
            graph.erase_node(node)
    graph.erase_node(mark)


def _marker(graph: Graph, here: Node) -> Node:
    """A node that holds a place while those around it move."""
    with graph.inserting_before(here):
        return graph.call_function(_M.end.default, ())
