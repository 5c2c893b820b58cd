"""Chunks that Python walked through one by one are a rolled region: rows cut by the numbers of one tensor.

a, b = x.split(counts.tolist())          for e in 0, 1:
y = cat([f(a, W[0]), f(b, W[1])])   →        collect(f(x[start(e):end(e)], W[e]))

Dynamo has written the loop out, however its lists were handed about; what it did for each expert is compared node by
node with what it did for the first one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moec.capture.effects import root, written
from moec.capture.numbers import numbers_of

_M = torch.ops.moec
_SPLITTING = frozenset(("split", "split_with_sizes"))
_ASSERTING = frozenset(("_assert_scalar", "_check", "sym_constrain_range", "sym_constrain_range_for_size"))
_JOINING = frozenset(("cat", "concat", "concatenate"))


@dataclass(frozen=True)
class _Cut:
    """rows[R, …] cut into `chunks`, one for each number."""

    node: Node
    rows: Node
    chunks: tuple[Node, ...]


@dataclass(frozen=True)
class _Walk:
    """What Python did with the chunks at each place, and where all of it is joined.

    bodies  for each place, its nodes in order; `given`: what those of the first place read from outside, each with
            what stands for it at every place
    """

    counts: Node
    cuts: tuple[_Cut, ...]
    bodies: tuple[tuple[Node, ...], ...]
    joins: tuple[Node, ...]
    given: dict[Node, tuple[Node, ...]]


def roll_chunks(gm: GraphModule) -> None:
    """Put a region in the place of each walk over chunks; graphs that hold none stay as they are."""
    for counts, numbers in numbers_of(gm.graph).items():
        walk = _walk(gm.graph, counts, numbers)
        if walk is not None:
            _roll(gm.graph, walk)
            _forget(gm.graph, numbers)


def _forget(graph: Graph, numbers: tuple[Node, ...]) -> None:
    """Remove what only says that numbers are none below zero, or add up to the rows; unless something else reads them.

    A region cuts rows where a walk did; that the counts are those of its rows is for who understands it to see.
    """
    about = dict.fromkeys(numbers)
    for node in graph.nodes:
        if any(arg in about for arg in node.all_input_nodes):
            about[node] = None
    for node in about:
        said = node.op == "call_function" and getattr(node.target, "__name__", "").partition(".")[0] in _ASSERTING
        number = not isinstance(node.meta.get("example_value"), torch.Tensor) and node.op != "output"
        if not (said or number):
            return
    for node in reversed(about):
        graph.erase_node(node)


def _walk(graph: Graph, counts: Node, numbers: tuple[Node, ...]) -> _Walk | None:
    cuts = tuple(cut for node in graph.nodes if (cut := _cut(node, numbers)) is not None)
    owner = {chunk: place for cut in cuts for place, chunk in enumerate(cut.chunks)}
    joins: list[Node] = []
    bodies: list[list[Node]] = [[] for _ in numbers]
    for node in graph.nodes:
        places = {owner[arg] for arg in node.all_input_nodes if arg in owner}
        if node in owner or not places:
            continue
        if len(places) == 1 and node.op != "output":
            owner[node] = places.pop()
            bodies[owner[node]].append(node)
        elif _joins(node, [owner.get(part, -1) for part in _parts(node)], len(numbers)):
            joins.append(node)
        else:
            return None
    given = _alike(bodies, cuts, owner)
    if not joins or given is None or not _may_move(graph, bodies, cuts, joins, given):
        return None
    first = [bodies[0].index(part) for join in joins if (part := _parts(join)[0]) in bodies[0]]
    same = all(_parts(j)[p] is bodies[p][i] for j, i in zip(joins, first, strict=False) for p in range(len(numbers)))
    if len(first) != len(joins) or not same:
        return None
    return _Walk(counts, cuts, tuple(map(tuple, bodies)), tuple(joins), given)


def _cut(node: Node, numbers: tuple[Node, ...]) -> _Cut | None:
    """`rows.split(numbers)` of which only the chunks are read."""
    if not node.op.startswith("call_") or getattr(node.target, "__name__", node.target) not in _SPLITTING:
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


def _parts(node: Node) -> list[Any]:
    """What a node joins."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors", ())
    return list(parts) if isinstance(parts, Sequence) else []


def _joins(node: Node, places: list[int], count: int) -> bool:
    """Whether a node joins one result of every place, in order, along the first axis."""
    joining = node.op == "call_function" and getattr(node.target, "__name__", "") in _JOINING
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return joining and type(dim) is int and dim == 0 and places == list(range(count))


def _alike(
    bodies: list[list[Node]], cuts: tuple[_Cut, ...], owner: dict[Node, int]
) -> dict[Node, tuple[Node, ...]] | None:
    """What the first body reads from outside, with what each other body reads in its place; None where they differ."""
    given: dict[Node, list[Node]] = {}
    first = (*(cut.chunks[0] for cut in cuts), *bodies[0])
    for place, body in enumerate(bodies):
        if len(body) != len(bodies[0]):
            return None
        pairs = zip(first, (*(cut.chunks[place] for cut in cuts), *body), strict=True)
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
    kinds = {(tuple(map(str, v.shape)), v.dtype, v.device) for v in values if isinstance(v, torch.Tensor)}
    return len(kinds) == 1


def _may_move(
    graph: Graph,
    bodies: list[list[Node]],
    cuts: tuple[_Cut, ...],
    joins: list[Node],
    given: dict[Node, tuple[Node, ...]],
) -> bool:
    """Whether all that the bodies do can be done where the first of them is joined."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    here = order[joins[0]]
    own = {node for body in bodies for node in body}
    read = {node for held in given.values() for node in held} | {cut.rows for cut in cuts}
    if any(order[node] >= here for node in (*read, *own)):
        return False
    begin = min(order[cut.node] for cut in cuts)
    for node, place in order.items():
        targets = [root(t) for t in written(node)] if begin < place < here or node in own else []
        if any(target not in own for target in targets):
            return False
    return True


def _roll(graph: Graph, walk: _Walk) -> None:
    """Write the region, and remove what it stands for."""
    here, body = walk.joins[0], walk.bodies[0]
    mode = next(v.fake_mode for n in graph.nodes if isinstance(v := n.meta.get("example_value"), FakeTensor))
    trace = here.meta.get("stack_trace")

    def emit(target: Any, *args: Any, like: Any = None) -> Node:
        with graph.inserting_before(here):
            node = graph.call_function(target, args)
        node.meta["stack_trace"] = trace
        if like is None:
            with mode:
                like = target(*map_arg(args, lambda arg: arg.meta["example_value"]))
        node.meta["example_value"] = like
        return node

    held = walk.counts.meta["example_value"]
    ends = emit(torch.cumsum, walk.counts, 0)
    item = emit(_M.anchor_range.default, 0, len(walk.bodies), 1, held.device)
    stop = emit(_M.take.default, ends, item)
    start = emit(operator.sub, stop, emit(_M.take.default, walk.counts, item))
    first = walk.cuts[0].chunks[0].meta["example_value"]
    with mode:
        places = torch.empty((first.shape[0],), dtype=torch.int64, device=held.device)
    span = emit(_M.span.default, start, stop, like=places)
    for cut in walk.cuts:
        rows = emit(operator.getitem, cut.rows, span, like=cut.chunks[0].meta["example_value"])
        cut.chunks[0].replace_all_uses_with(rows)
    tables = {
        a: a if all(b is a for b in held) else emit(_M.pick.default, list(held), item) for a, held in walk.given.items()
    }
    for node in body:
        node.args = map_arg(node.args, lambda arg: tables.get(arg, arg))
        node.kwargs = map_arg(node.kwargs, lambda arg: tables.get(arg, arg))
        here.prepend(node)
    joined = [
        (join, emit(_M.collect.default, _parts(join)[0], item, like=join.meta["example_value"])) for join in walk.joins
    ]
    emit(_M.end.default, item, like=())
    for join, collected in joined:
        join.replace_all_uses_with(collected)
        graph.erase_node(join)
    for other in walk.bodies[1:]:
        for node in reversed(other):
            graph.erase_node(node)
    for cut in walk.cuts:
        for node in (*cut.chunks, cut.node):
            graph.erase_node(node)
