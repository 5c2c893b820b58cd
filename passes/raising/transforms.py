"""What a transform of torch.func (vmap, grad, jvp) runs is told apart from the rest of a graph.

Custom operators with a gradient cannot run inside of a transform, and a tensor there has fewer axes than it seems to
have: nothing in it is understood. A mask that is made under vmap, say, leaves the layers behind it as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from moec.passes.raising.updates import has_inplace_flag, is_update
from moec.passes.raising.word_contract import overload_of
from moec.passes.raising.words import key_of

_ENTERS = "_increment_nesting"


def transformed(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """The nodes from where a graph enters a transform to where it has left it, both included."""
    if not any(_name(target).endswith(_ENTERS) for target in {node.target for node in gm.graph.nodes}):
        return frozenset()
    found: set[fx.Node] = set()
    depth = 0
    for node in gm.graph.nodes:
        depth += _name(node.target).endswith(_ENTERS)
        if depth:
            found.add(node)
        depth -= _name(node.target).endswith("_decrement_nesting")
    return frozenset(found)


def _name(target: object) -> str:
    return getattr(target, "__name__", "")


def updates_inside(gm: fx.GraphModule) -> bool:
    """Whether a transform changes a tensor in place: what holds its new value then cannot be said."""
    calls = (node for node in transformed(gm) if node.op.startswith("call_") and node.args)
    return any(_updates(node) for node in calls)


def _updates(node: fx.Node) -> bool:
    key, overload = key_of(node), overload_of(node)
    written = key == "setitem" or node.kwargs.get("out") is not None
    mutable = overload is not None and overload._schema.is_mutable
    return written or mutable or is_update(node, key) or has_inplace_flag(node)


def untransformed(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph and the graphs that its higher-order operators run, without those that run inside of a transform."""
    yield gm
    inside = transformed(gm)
    apart = {node.target for node in gm.graph.nodes if node.op == "get_attr" and inside.intersection(node.users)}
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule) and name not in apart:
            yield from untransformed(child)
