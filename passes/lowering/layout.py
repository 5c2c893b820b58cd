"""A result lies in memory as the value that it replaces: users may go on to view it.

zeros_like(x) of a transposed x is transposed too, and can be viewed by `y.t().view(-1)`; the rows that kernels write
are not.
"""

from __future__ import annotations

from itertools import permutations

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moec.passes.raising.raise_graph import fake


def laid_out(graph: fx.Graph, new: fx.Node, old: fx.Node) -> fx.Node:
    """The node that holds `new` with the axes in memory in the order of `old`'s; `new` where nothing is to be done."""
    order = axes_in_memory(fake(old))
    if order is None or order == tuple(sorted(order)):
        return new
    back = tuple(order.index(axis) for axis in range(len(order)))
    for method, args in (("permute", (order,)), ("contiguous", ()), ("permute", (back,))):
        with graph.inserting_after(new):
            new = graph.call_method(method, (new, *args))
    return new


def axes_in_memory(value: object) -> tuple[int, ...] | None:
    """The axes of a dense tensor, the outermost in memory first; None where it is none, or its sizes do not say."""
    shape, stride = getattr(value, "shape", None), getattr(value, "stride", None)
    if shape is None or stride is None or len(shape) > _MOST:
        return None
    return next((order for order in permutations(range(len(shape))) if _dense(shape, stride(), order)), None)


_MOST = 4  # axes: their orders are tried one after the other, the usual one first


def _dense(shape: tuple[int, ...], stride: tuple[int, ...], order: tuple[int, ...]) -> bool:
    """Whether the axes follow each other in this order without gaps."""
    step = 1
    for axis in reversed(order):
        if not statically_known_true(shape[axis] == 1) and not statically_known_true(stride[axis] == step):
            return False
        step = step * shape[axis]
    return True
