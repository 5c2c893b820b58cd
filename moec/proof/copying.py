"""Copy what a value needs out of torch's graph: nodes, the updates they see, the loops they are in; down to a cut."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moec.capture.region import Region
from moec.ir.graph import Ref, Type
from moec.passes.lowering.lower import Lowering
from moec.passes.raising.raise_graph import dim_of, fake, type_of_fake
from moec.passes.raising.words import key_of

LIMIT = 4000  # nodes; a region that is larger than any layer has lost its way

METADATA = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "size", "dim"}
    | {"new_zeros", "new_ones", "new_full", "new_empty"}
)
"""What these make depends on their first argument's shape and dtype, not on its numbers."""


class Unprovable(Exception):
    """The two graphs cannot be made or run; says why."""


class Fails(Unprovable):
    """The replacement fails where the matched code runs."""


@dataclass(frozen=True)
class Leaf:
    """A value that both graphs read.

    role  token | weight | choice | router | param: as the site takes it; given: anything else; shape: only its shape
    node  an FX node that holds it, where there is one
    """

    name: str
    role: str
    type: Type
    node: fx.Node | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Size:
    """A size that stands in a copied node's arguments, as an expression of the graph's symbols."""

    expr: sympy.Expr

    def __str__(self) -> str:
        return str(self.expr)


@dataclass
class Source:
    """The graph that is copied from."""

    lowering: Lowering
    by_name: dict[str, fx.Node]
    loops: tuple[Region, ...]

    @cached_property
    def histories(self) -> dict[fx.Node, list[tuple[str, int]]]:
        """What each node has held, oldest first."""
        return {node: sorted(steps, key=lambda s: s[1]) for node, steps in self.lowering.histories.items()}

    @cached_property
    def anchors(self) -> dict[fx.Node, Region]:
        """The loop that each anchor begins."""
        return {region.anchor: region for region in self.loops}

    @cached_property
    def inside(self) -> frozenset[fx.Node]:
        """The nodes of loops' bodies whose values cannot be read after the loop."""
        leaves = {leave for region in self.loops for _, leave in region.carries}
        return frozenset(node for region in self.loops for node in region.members if node not in leaves)

    def maker(self, value: str) -> fx.Node:
        """The node whose execution made the value."""
        return self.by_name[value.partition(".")[0]]

    def position(self, node: fx.Node) -> int:
        """The node's place in the graph."""
        return self.lowering.raised.order[node]

    def steps(self, node: fx.Node, reader: fx.Node) -> list[tuple[str, int]]:
        """What the node had held when `reader` ran, oldest first."""
        at = self.position(reader)
        return [step for step in self.histories.get(node, ()) if step[1] < at]


@dataclass
class Copy:
    """A graph that computes values of `source` from the values in `cut`, which become its placeholders.

    feeds  placeholder → the leaf that it stands for; a leaf has a placeholder for each node that held it,
           so that an update in place of one does not change the others
    """

    source: Source
    cut: dict[str, Leaf]
    graph: fx.Graph = field(default_factory=fx.Graph)
    feeds: dict[str, str] = field(default_factory=dict[str, str])
    leaves: dict[str, Leaf] = field(default_factory=dict[str, Leaf])
    _env: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    _inputs: dict[tuple[str, fx.Node | None], fx.Node] = field(default_factory=dict[Any, fx.Node])

    def __post_init__(self) -> None:
        self.cut = dict(self.cut)

    def operand(self, name: str) -> fx.Node:
        """The node of this graph that holds a value: a leaf, or one already computed."""
        return self._leaf(self.cut[name], None) if name in self.cut else self._holder(name)

    def value(self, name: str, within: Collection[str] = ()) -> fx.Node:
        """The node that computes a value. With `within`, others than these become leaves, but constants and orders."""
        return self.values((name,), within)[0]

    def values(self, names: Collection[str], within: Collection[str] = ()) -> tuple[fx.Node, ...]:
        """The nodes that compute several values, copied together: what one loop computes stays in that loop."""
        makers = [node for name in names if name not in self.cut for node in self._makers(name)]
        self._copy(self._closure(makers, within))
        return tuple(map(self.operand, names))

    def _makers(self, name: str) -> Iterator[fx.Node]:
        """The node that makes a value; and the one that takes it out, where it is one of several results."""
        made = self.source.maker(name)
        yield made
        for node, _ in self.source.lowering.raised.carriers.get(name, ()):
            if node.target is operator.getitem and node.args[0] is made:
                yield node
                return

    def _holder(self, name: str) -> fx.Node:
        updated = {node: made for (_, node), made in self._inputs.items() if node is not None}
        for node, since in self.source.lowering.raised.carriers.get(name, ()):
            made = self._env.get(node, updated.get(node))
            if made is not None and node not in self.source.inside and self._last(node) == (name, since):
                return made
        raise Unprovable(f"nothing holds %{name} at the end of the matched code")

    def _last(self, node: fx.Node) -> tuple[str, int] | None:
        """What the node holds after everything that was copied."""
        steps = reversed(self.source.histories[node])
        return next((step for step in steps if self.source.maker(step[0]) in self._env), None)

    def _leaf(self, leaf: Leaf, node: fx.Node | None) -> fx.Node:
        key = (leaf.name, node)
        if key not in self._inputs:
            with self.graph.inserting_before(None):
                made = self.graph.placeholder(f"leaf_{len(self._inputs)}")
            holder = node if node is not None else leaf.node
            made.meta = {"example_value": fake(holder)} if holder is not None else {}
            self._inputs[key] = made
            self.leaves.setdefault(leaf.name, leaf)
            self.feeds[made.name] = leaf.name
        return self._inputs[key]

    def _closure(self, makers: list[fx.Node], within: Collection[str]) -> list[fx.Node]:
        """The nodes to copy, in order."""
        wanted = dict.fromkeys(makers)
        todo = list(makers)
        while todo:
            node = todo.pop()
            if len(wanted) > LIMIT:
                raise Unprovable(f"the matched code reads more than {LIMIT} nodes of the graph")
            more = [m for arg in node.all_input_nodes for m in self._needs(node, arg, within)]
            more += _frame(self.source.anchors[node]) if node in self.source.anchors else []
            for each in more:
                if each not in wanted and each not in self._env:
                    wanted[each] = None
                    todo.append(each)
        return sorted(wanted, key=self.source.position)

    def _needs(self, node: fx.Node, arg: fx.Node, within: Collection[str]) -> Iterator[fx.Node]:
        """The nodes that must run before `node` can read `arg`."""
        if size_of(arg) is not None or _only_metadata(node, arg):
            return
        steps = self.source.steps(arg, node)
        since = max((i for i, (name, _) in enumerate(steps) if name in self.cut), default=-1)
        if since < 0:
            if within and steps and steps[-1][0] not in within and not self._is_computed(steps[-1][0]):
                self.cut[steps[-1][0]] = Leaf(steps[-1][0], "given", type_of_fake(fake(arg)), arg)
                return
            if arg.op in ("placeholder", "get_attr"):
                return
            yield arg
        for name, _ in steps[max(since, 0) + 1 :]:
            yield self.source.maker(name)

    def _is_computed(self, name: str) -> bool:
        """Whether any value would not do: a constant, and an order of rows, which has each of them once."""
        graph = self.source.lowering.raised.graph
        source = graph.behind(Ref(name), ("expand", "reshape", "cast", "same"))
        made = graph.defs.get(source.name) if isinstance(source, Ref) else None
        return made is not None and (not made.uses or (made.word == "sort" and source == Ref(made.results[-1])))

    def _copy(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if node not in self._env:

                def read(arg: fx.Node, node: fx.Node = node) -> Any:
                    return self._read(arg, node)

                args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
                self._env[node] = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
                self._env[node].meta = {"example_value": fake(node)}

    def _read(self, arg: fx.Node, node: fx.Node) -> Any:
        """What stands for `arg` in the copy of `node`."""
        size = size_of(arg)
        if size is not None:
            return size
        for name, _ in reversed(self.source.steps(arg, node)):
            if name in self.cut:
                return self._leaf(self.cut[name], arg)
        if arg in self._env:
            return self._env[arg]
        role = "shape" if _only_metadata(node, arg) else "given"
        name = f"{arg.name}.shape" if role == "shape" else arg.name
        return self._leaf(Leaf(name, role, type_of_fake(fake(arg)), arg), arg)


def size_of(node: fx.Node) -> Size | None:
    """The size that a node stands for, where it does not depend on data."""
    value = fake(node)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int or (isinstance(value, torch.SymInt) and not free_unbacked_symbols(value)):
        return Size(dim_of(value))
    return None


def _only_metadata(node: fx.Node, arg: fx.Node) -> bool:
    return key_of(node) in METADATA and bool(node.args) and node.args[0] is arg


def _frame(region: Region) -> list[fx.Node]:
    """What makes a loop of a body: its skips, its carried values, its end."""
    return [*region.skips, *(node for pair in region.carries for node in pair), region.end]
