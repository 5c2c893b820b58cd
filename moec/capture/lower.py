"""Regions as real loops: a rolled region that nobody replaced runs its body once for each item, with real tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from moec.capture.region import CARRIES, SKIPS, Region, hoist_invariants, regions

_M = torch.ops.moec
_MARK = "moec_region"


def lower_regions(gm: GraphModule) -> GraphModule:
    """The graph with every region as a call of a `RegionLoop`; changes and returns `gm`. Raises Malformed."""
    for i, found in enumerate(regions(gm)):
        region = hoist_invariants(gm.graph, found)
        loop = RegionLoop.of(region)
        name = f"{_MARK}_{i}"
        gm.add_submodule(name, loop)
        with gm.graph.inserting_before(region.anchor):
            result = gm.graph.call_module(name, region.inputs)
        leaves = [*(leave for _, leave in region.carries), *region.collects]
        result.meta["example_value"] = tuple(leave.meta.get("example_value") for leave in leaves)
        for place, leave in enumerate(leaves):
            with gm.graph.inserting_before(region.end):
                value = gm.graph.call_function(operator.getitem, (result, place))
            value.meta = dict(leave.meta)
            leave.replace_all_uses_with(value)
        for node in (region.end, *reversed(region.nodes), region.anchor):
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


@dataclass(frozen=True)
class _Segment:
    """The part of a body up to a skip, or to its end."""

    body: GraphModule
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    ends_if: str | None  # the value that ends the iteration where it is true (a condition)
    ends_if_zero: str | int | None  # or zero (a size)


class RegionLoop(nn.Module):
    """A region as a Python loop: `forward(*inputs)` writes to the accumulators and returns the yielded values."""

    _is_impure = True  # it may act by its writes alone, so it is kept without users

    def __init__(
        self,
        reads: tuple[str, ...],
        items: Callable[[dict[str, Any]], Sequence[Tensor]],
        item: str,
        carries: tuple[tuple[str, Any, str], ...],
        collects: tuple[tuple[str, tuple[Any, ...]], ...],
        segments: tuple[_Segment, ...],
    ) -> None:
        super().__init__()
        self.reads = reads
        self.items = items
        self.item = item
        self.carries = carries  # (name inside, name of the first value or a number, name of the next value)
        self.collects = collects  # (name, sizes of a row, dtype and device)
        self.segments = segments

    @staticmethod
    def of(region: Region) -> RegionLoop:
        """The loop that the region means."""
        carries = tuple((enter.name, _first(enter.args[0]), leave.name) for enter, leave in region.carries)
        collects = tuple((node.name, _row_like(node)) for node in region.collects)
        reads = tuple(node.name for node in region.inputs)
        return RegionLoop(reads, _items(region), region.anchor.name, carries, collects, _segments(region))

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        outer = dict(zip(self.reads, inputs, strict=True))
        carried = {name: _value(outer, first) for name, first, _ in self.carries}
        rows: dict[str, list[Tensor]] = {name: [] for name, _ in self.collects}
        for item in self.items(outer):
            env = {**outer, **carried, self.item: item}
            self._iterate(env)
            carried = {name: env.get(new, carried[name]) for name, _, new in self.carries}
            for name in rows:
                rows[name] += [env[name]] if name in env else []
        joined = [torch.cat(rows[name]) if rows[name] else _no_rows(like) for name, like in self.collects]
        return (*(carried[name] for name, _, _ in self.carries), *joined)

    def _iterate(self, env: dict[str, Any]) -> None:
        """One iteration, up to its end or to a skip."""
        for segment in self.segments:
            values = segment.body(*(env[name] for name in segment.reads))
            env.update(zip(segment.gives, values, strict=True))
            if segment.ends_if is not None and bool(env[segment.ends_if]):
                return
            zero = segment.ends_if_zero
            if zero is not None and (env[zero] if isinstance(zero, str) else zero) == 0:
                return


def _value(outer: dict[str, Any], first: Any) -> Any:
    """The first value of what is carried: a tensor of the outside, or a number as a tensor."""
    value = outer[first] if isinstance(first, str) else first
    return value if isinstance(value, Tensor) else torch.tensor(int(value))


def _first(value: Any) -> Any:
    return value.name if isinstance(value, Node) else value


def _row_like(node: Node) -> tuple[Any, ...]:
    fake = node.meta["example_value"]
    return (fake.shape[1:], fake.dtype, fake.device)


def _no_rows(like: tuple[Any, ...]) -> Tensor:
    """What `cat` gives where no iteration gave rows: none of them."""
    sizes, dtype, device = like
    return torch.empty((0, *(int(s) for s in sizes)), dtype=dtype, device=device)


def _items(region: Region) -> Callable[[dict[str, Any]], Sequence[Tensor]]:
    args: list[Any] = [a.name if isinstance(a, Node) else a for a in region.anchor.args]
    if not region.over_range:
        return lambda env: env[args[0]].to(torch.int64).unbind(0)

    def over_range(env: dict[str, Any]) -> Sequence[Tensor]:
        start, end, step = (env[a] if isinstance(a, str) else a for a in args[:3])
        return torch.tensor(list(range(start, end, step)), dtype=torch.int64, device=args[3]).unbind(0)

    return over_range


def _segments(region: Region) -> tuple[_Segment, ...]:
    groups: list[tuple[list[Node], Node | None]] = []
    current: list[Node] = []
    for node in region.nodes:
        if node.target in SKIPS:
            groups.append((current, node))
            current = [node]  # its value is the item, which the next segment may use
        else:
            current.append(node)
    groups.append((current, None))
    wanted = set[Any](region.collects) | {leave for _, leave in region.carries}
    return tuple(_segment(nodes, skip, wanted) for nodes, skip in groups)


def _segment(nodes: list[Node], skip: Node | None, wanted: set[Any]) -> _Segment:
    graph, env = Graph(), dict[Node, Node]()
    reads: list[str] = []
    inside = set(nodes)

    def value(node: Node) -> Node:
        if node not in env:
            before = next(iter(graph.nodes)) if reads else None
            with graph.inserting_before(before) if before else graph.inserting_after(graph._root):
                env[node] = graph.placeholder(node.name)
            reads.insert(0, node.name)
        return env[node]

    for node in nodes:
        if _is_bookkeeping(node) or node.target in CARRIES:
            continue
        env[node] = _executable(graph, node, value)
    condition = skip.args[1] if skip is not None else None
    keep = [n for n in nodes if n in env and (n in wanted or n is condition or any(u not in inside for u in n.users))]
    graph.output(tuple(env[n] for n in keep))
    module = GraphModule(nn.Module(), graph)
    name = condition.name if isinstance(condition, Node) else condition
    is_size = skip is not None and skip.target is _M.skip_size.default
    gives = tuple(n.name for n in keep)
    return _Segment(module, tuple(reads), gives, None if is_size else name, name if is_size else None)  # type: ignore[arg-type]


def _executable(graph: Graph, node: Node, value: Callable[[Node], Node]) -> Node:
    """The node with real meaning: markers as the indexing that they stand for."""
    if node.target in SKIPS:
        return value(node.args[0])  # type: ignore[arg-type]
    if node.target is _M.take.default:
        table, item = node.args
        return graph.call_function(operator.getitem, (value(table), value(item)))  # type: ignore[arg-type]
    if node.target is _M.pick.default:
        tables, item = node.args
        return graph.call_function(_pick, ([value(t) for t in tables], value(item)))  # type: ignore[arg-type,union-attr]
    if node.target in (_M.yield_.default, _M.collect.default):
        return value(node.args[node.target is _M.yield_.default])  # type: ignore[arg-type]
    if node.target is _M.span.default:
        return graph.call_function(_span, (value(node.args[0]), value(node.args[1])))  # type: ignore[arg-type]
    return graph.node_copy(node, value)


def _pick(tables: Sequence[Tensor], item: Tensor) -> Tensor:
    return tables[int(item)]


def _span(start: Tensor, stop: Tensor) -> Tensor:
    return torch.arange(int(start), int(stop), device=start.device)


def _is_bookkeeping(node: Node) -> bool:
    """Dynamo's assertions on sizes that depend on data, and what only they use."""
    if node.target is torch.ops.aten._assert_scalar.default:
        return True
    is_test = node.target in (operator.ge, operator.le, operator.eq, operator.lt, operator.gt, operator.ne)
    is_size = node.target is torch.ops.aten.sym_size.int
    return (is_test or is_size) and all(_is_bookkeeping(user) for user in node.users) and bool(node.users)
