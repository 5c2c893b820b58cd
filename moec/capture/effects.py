"""What a node of a torch-level graph writes to, and which tensor a view belongs to."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

_IN_PLACE = frozenset(
    getattr(operator, f"i{name}")
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "matmul",
        "lshift",
        "rshift",
    )
) | {operator.setitem}
_VIEWS = frozenset(
    [
        "view",
        "reshape",
        "expand",
        "permute",
        "transpose",
        "movedim",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "narrow",
        "select",
        "t",
        "view_as",
        "expand_as",
        "unbind",
        "chunk",
        "split",
        "detach",
        "contiguous",
        "to",
        "float",
        "swapaxes",
        "swapdims",
        "moveaxis",
        "diagonal",
        "ravel",
        "unfold",
        "tensor_split",
        "type",
        "half",
        "bfloat16",
    ]
)
_ASKS = frozenset(("size", "dim", "numel", "stride", "is_floating_point", "get_device", "ndimension", "element_size"))


def called_name(node: Node) -> str:
    """The name of the method or function that a node calls; '' for a node that calls none."""
    return str(getattr(node.target, "__name__", node.target)) if node.op.startswith("call_") else ""


def written(node: Node) -> tuple[Node, ...]:
    """The nodes whose tensors this node writes to."""
    if node.op == "call_method":
        target = str(node.target)
        in_place = (target.endswith("_") and not target.endswith("__")) or target == "__setitem__"
        return _nodes(node.args[:1]) if in_place else _nodes([node.kwargs.get("out")])
    if node.op != "call_function":
        return ()
    if node.target in _IN_PLACE:
        return _nodes(node.args[:1])
    if isinstance(node.target, torch._ops.OpOverload):
        return _written_by_schema(node, node.target)
    name = getattr(node.target, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True:
        return _nodes(node.args[:1] or [node.kwargs.get("input")])
    return _nodes([node.kwargs.get("out")])


def _written_by_schema(node: Node, target: torch._ops.OpOverload) -> tuple[Node, ...]:
    found: list[Any] = []
    for i, arg in enumerate(target._schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            found.append(node.kwargs.get(arg.name) if arg.name in node.kwargs or arg.kwarg_only else node.args[i])
    return _nodes(found)


def _nodes(values: Any) -> tuple[Node, ...]:
    return tuple(value for value in values if isinstance(value, Node))


def viewed(node: Node) -> Node | None:
    """The tensor that the result of this node may share memory with, or None where the result is new."""
    base = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if base is None:
        return None
    if node.op == "call_method" and node.target in _VIEWS:
        return base
    if node.op == "call_function" and node.target is operator.getitem:
        return base if _is_basic(node.args[1]) else None
    if node.op == "call_function" and getattr(node.target, "__name__", "").split(".")[0] in _VIEWS:
        return base
    if node.op == "call_function" and node.target in (torch.ops.moec.take.default, torch.ops.moec.carry.default):
        return base
    return base if base in written(node) else None


def _is_basic(index: Any) -> bool:
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return not any(isinstance(p, Node) and isinstance(p.meta.get("example_value"), torch.Tensor) for p in parts)


def root(node: Node) -> Node:
    """The node that owns the memory of this node's tensor, as far as the graph tells."""
    while True:
        base = viewed(node)
        if base is None:
            return node
        node = base


def only_asks(node: Node) -> bool:
    """Whether a node reads the shape or type of its argument and none of its elements."""
    if node.op == "call_method":
        return node.target in _ASKS
    return node.op == "call_function" and (
        node.target in (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)
        or (
            not isinstance(node.meta.get("example_value"), torch.Tensor)
            and not any(isinstance(a.meta.get("example_value"), torch.Tensor) for a in node.all_input_nodes)
        )
    )
