"""A graph in parts: what lies before, between and after its regions is compiled, the regions run as loops."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_aggregate, map_arg
from torch.fx.passes.split_module import split_module

from moec.capture.lower import RegionLoop, lower_regions
from moec.capture.region import regions

Compile = Callable[[GraphModule, list[Any]], Callable[..., Any]]


def compile_parts(gm: GraphModule, compile_fn: Compile) -> Callable[..., Any]:
    """Run regions as loops and hand what lies before, between and after them to `compile_fn(part, example_inputs)`.

    Nodes on sizes that depend on data stay with the loops, so no unbacked size enters a compiled part. Without
    a region the whole graph is one part. Each part returns a tuple; example inputs are fake tensors.
    """
    if not regions(gm):
        return compile_fn(gm, _examples(gm))
    gm = lower_regions(gm)
    _fill_in(gm)
    _open_shapes(gm)
    try:
        split = split_module(gm, gm, _partition(gm), keep_original_order=True)
    except KeyError:  # a size made of one that depends on data: no part can be given it, so all run as they are
        return gm.forward
    for name, part in list(split.named_children()):
        if not isinstance(part, GraphModule) or _has_region(part) or not _computes(part):
            continue
        single = _make_tuple(part)
        with _own_context():
            setattr(split, name, _Compiled(compile_fn(part, _examples(part)), single))
    return split


def _fill_in(gm: GraphModule) -> None:
    """Fake values of the nodes that lowering made: what one part hands to another needs one."""
    known = {node: node.meta["example_value"] for node in gm.graph.nodes if "example_value" in node.meta}
    mode = next((value.fake_mode for value in known.values() if isinstance(value, FakeTensor)), None)
    for node in gm.graph.nodes:
        given = node.all_input_nodes
        if node in known or mode is None or not node.op.startswith("call_") or not all(each in known for each in given):
            continue
        args, kwargs = map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        target = getattr(args[0], node.target) if node.op == "call_method" else node.target
        with mode:
            known[node] = target(*(args[1:] if node.op == "call_method" else args), **kwargs)
        node.meta["example_value"] = known[node]


def _open_shapes(gm: GraphModule) -> None:
    """Whole shapes as their sizes one by one: AOTAutograd lets a part return numbers, but no `torch.Size`."""
    for node in list(gm.graph.nodes):
        if not isinstance(node.meta.get("example_value"), torch.Size):
            continue
        sizes = _sizes(gm.graph, node)
        if sizes is None:
            continue
        for user in list(node.users):
            user.args = map_aggregate(user.args, lambda arg, node=node, sizes=sizes: sizes if arg is node else arg)
            user.kwargs = map_aggregate(user.kwargs, lambda arg, node=node, sizes=sizes: sizes if arg is node else arg)
        gm.graph.erase_node(node)


def _sizes(graph: Graph, node: Node) -> tuple[Any, ...] | None:
    """The sizes that a shape is made of: numbers and nodes."""
    if node.target is torch.Size:
        (given,) = node.args
        return tuple(given) if isinstance(given, (tuple, list)) else None
    if node.target != "size" or len(node.args) != 1:
        return None
    sizes: list[Node | int] = []
    for dim, size in enumerate(node.meta["example_value"]):
        if isinstance(size, int):
            sizes.append(size)
            continue
        with graph.inserting_before(node):
            one = graph.call_method("size", (node.args[0], dim))
        one.meta["example_value"] = size
        sizes.append(one)
    return tuple(sizes)


@contextmanager
def _own_context() -> Generator[None]:
    """A tracing context for one part: AOTAutograd keeps one set of facts in it about the graph it compiles."""
    outer = TracingContext.try_get()
    if outer is None:
        yield
        return
    inner = TracingContext(outer.fake_mode)
    inner.guards_context = outer.guards_context
    with tracing(inner):
        yield


class _Compiled(nn.Module):
    """A compiled part in the place of its graph."""

    def __init__(self, fn: Callable[..., Any], single: bool) -> None:
        super().__init__()
        self.fn = fn
        self.single = single

    def forward(self, *args: Any) -> Any:
        out = self.fn(*args)
        return out[0] if self.single else out


def _partition(gm: GraphModule) -> Callable[[Node], int]:
    """Consecutive numbers for stretches of nodes that run eagerly or are compiled."""
    place: dict[Node, int] = {}
    part, eager = 0, False
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        here = eager if _is_context(node) else _runs_eagerly(gm, node)
        part += here != eager
        eager = here
        place[node] = part
    return lambda node: place.get(node, 0)


def _is_context(node: Node) -> bool:
    return node.op == "call_function" and node.target in (
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    )


def _runs_eagerly(gm: GraphModule, node: Node) -> bool:
    if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), RegionLoop):
        return True
    return any(_is_unbacked(n.meta.get("example_value")) for n in (node, *node.all_input_nodes))


def _is_unbacked(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_unbacked(v) for v in value)
    if isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return bool(free_unbacked_symbols(value))
    return False


def _has_region(part: GraphModule) -> bool:
    return any(_runs_eagerly(part, node) for node in part.graph.nodes if node.op.startswith("call_"))


def _computes(part: GraphModule) -> bool:
    return any(node.op.startswith("call_") and not _is_context(node) for node in part.graph.nodes)


def _make_tuple(part: GraphModule) -> bool:
    """Have a part return a tuple; true where it returned one value."""
    output = next(node for node in reversed(part.graph.nodes) if node.op == "output")
    if isinstance(output.args[0], (tuple, list)):
        return False
    output.args = ((output.args[0],),)
    part.recompile()
    return True


def _examples(part: GraphModule) -> list[Any]:
    return [_leaf(node.meta["example_value"]) for node in part.graph.nodes if node.op == "placeholder"]


def _leaf(value: Any) -> Any:
    """A fake input as the part will see it: same size and requires_grad, without the history of its making."""
    if not isinstance(value, Tensor) or value.is_leaf:
        return value
    return value.detach().requires_grad_(value.requires_grad)
