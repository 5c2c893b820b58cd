"""An FX graph, and the module that has it, as they were: what a rewrite that fails half-way is undone with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class KeptNode:
    """What a rewrite may change of one node."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


@dataclass(frozen=True)
class KeptGraph:
    """A graph's nodes in order; keeping them costs a small part of what a copy of the graph does."""

    graph: fx.Graph
    nodes: tuple[KeptNode, ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> KeptGraph:
        """The graph as it is now."""
        nodes = (KeptNode(n, n.target, n.args, n.kwargs, dict(n.meta)) for n in graph.nodes)
        return cls(graph, tuple(nodes))

    def restored(self) -> fx.Graph:
        """A new graph that equals the one that was kept, whatever has become of its nodes."""
        graph = fx.Graph(tracer_cls=self.graph._tracer_cls)
        graph.set_codegen(self.graph._codegen)
        again: dict[fx.Node, fx.Node] = {}
        for kept in self.nodes:
            old = kept.node
            args = fx.map_arg(kept.args, again.__getitem__)
            kwargs = fx.map_arg(kept.kwargs, again.__getitem__)
            node = graph.create_node(old.op, kept.target, args, kwargs, old.name, old.type)
            node.meta = dict(kept.meta)
            if hasattr(old, "_dynamo_source"):  # where an input comes from, which autograd's compiler asks for
                node._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
            again[old] = node
        return graph


@dataclass(frozen=True)
class KeptModule:
    """A module's graph, and what is noted beside it: how a checkpointed block saves its values, say."""

    module: fx.GraphModule
    graph: KeptGraph
    meta: dict[str, Any]

    @classmethod
    def of(cls, module: fx.GraphModule) -> KeptModule:
        """The module as it is now."""
        return cls(module, KeptGraph.of(module.graph), dict(module.meta))

    def put_back(self) -> None:
        """The module is again what it was, its graph a new one that equals the old."""
        self.module.meta.clear()
        self.module.meta.update(self.meta)
        self.module.graph = self.graph.restored()
