"""Numbers that one function moved to the host and another cuts rows by: the tensor that they came from."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.comptime import comptime
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.lists import BaseListVariable
from torch.fx import Graph, GraphModule, Node, Proxy


def counted(numbers: Any) -> Tensor | None:
    """The tensor [n] whose `tolist()` the numbers are, or None; traced by Dynamo alone."""
    source: Any = None
    comptime(_find)  # reads numbers; sets source where there is one
    return source


def _find(ctx: Any) -> None:
    tx = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    held = tx.symbolic_locals["numbers"].realize()
    if not isinstance(held, BaseListVariable):
        return
    items = [item.realize() for item in held.items]
    nodes = [item.as_proxy().node if isinstance(item.as_proxy(), Proxy) else None for item in items]
    tensor = _whole(nodes)
    if tensor is None or tensor.graph is not tx.output.graph:
        return
    # A cast that changes nothing: the tensor as a value of this place in the trace.
    same = tx.output.create_proxy("call_method", "long", (Proxy(tensor, tx.output.current_tracer),), {})
    tx.symbolic_locals["source"] = wrap_fx_proxy(tx, same)


def _whole(nodes: list[Node | None]) -> Node | None:
    """The tensor t, where the nodes are `t[0].item()`, `t[1].item()`, … to its end."""
    found: list[Node] = []
    for place, node in enumerate(nodes):
        element = node.args[0] if node is not None and node.op == "call_method" and node.target == "item" else None
        if not isinstance(element, Node) or element.target is not operator.getitem or element.args[1] != place:
            return None
        found.append(element.args[0])  # type: ignore[arg-type]
    if not found or len(set(found)) != 1:
        return None
    value = found[0].meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.shape[0] != len(nodes):
        return None
    return None if value.is_floating_point() else found[0]


def numbers_of(graph: Graph) -> dict[Node, tuple[Node, ...]]:
    """The tensors whose numbers were moved to the host, all and in order; with these numbers."""
    found: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        element = node.args[0] if node.op == "call_method" and node.target == "item" else None
        if isinstance(element, Node) and element.target is operator.getitem and isinstance(element.args[0], Node):
            found.setdefault(element.args[0], []).append(node)
    return {tensor: tuple(nodes) for tensor, nodes in found.items() if _whole(list(nodes)) is tensor}


def drop_unread(gm: GraphModule) -> bool:
    """Remove the numbers that nothing reads; whether others are left."""
    items = [n for n in gm.graph.nodes if n.op == "call_method" and n.target == "item"]
    for node in reversed(items):
        element = node.args[0]
        if not node.users:
            gm.graph.erase_node(node)
            if isinstance(element, Node) and not element.users:
                gm.graph.erase_node(element)
    return any(n.op == "call_method" and n.target == "item" for n in gm.graph.nodes)
