"""The casts that autocast makes inside an operator become nodes of the graph, so that passes read what is computed.

linear(x, w)  under autocast to bf16   →   linear(x.to(bf16), w.to(bf16)), which autocast leaves as it is

No list of torch's is kept: an operator's casts are those with which it gives, outside autocast, the dtypes that
Dynamo saw. Where none does, what it computes is not known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate

from moec.passes.raising.raise_graph import fake, location
from moec.passes.raising.transforms import transformed
from moec.passes.raising.updates import has_inplace_flag, is_update
from moec.passes.raising.vocabulary import TABLE
from moec.passes.raising.words import key_of

DEVICES = ("cpu", "cuda")
PRODUCTS = frozenset(["linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm", "_grouped_mm"])
"""Operators that take operands of several dtypes under autocast alone: as they are, torch would log an error."""


def under_autocast(gm: fx.GraphModule, nested: bool) -> bool:
    """Whether operators may cast: autocast is on, the graph enters it, or another graph that runs this one may."""
    on = any(map(torch.is_autocast_enabled, DEVICES))
    return on or nested or any(n.target is torch.amp.autocast_mode._enter_autocast for n in gm.graph.nodes)


@contextlib.contextmanager
def outside_autocast() -> Generator[None]:
    """Operators compute in the dtypes of their operands."""
    with contextlib.ExitStack() as stack:
        for device in DEVICES:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def spell_casts(gm: fx.GraphModule) -> str:
    """Insert what autocast casts before each operator that passes know; '' or the operator that is not understood."""
    known: dict[Hashable, torch.dtype | str] = {}
    changed, apart = False, transformed(gm)
    for node in list(gm.graph.nodes):
        wanted = _mixed(node)
        if wanted is None or node in apart:
            continue
        signature = _signature(node, wanted)
        if signature not in known:
            known[signature] = _cast_to(node, wanted)
        found = known[signature]
        if found == "unknown":
            return f"{key_of(node)} at {location(node)}"
        if isinstance(found, torch.dtype):
            _insert(gm.graph, node, found)
            changed = True
    if changed:
        gm.recompile()
    return ""


def _mixed(node: fx.Node) -> tuple[torch.dtype, ...] | None:
    """The float dtypes of a known operator's results, where some float operand has another dtype."""
    if not node.op.startswith("call_") or (key := key_of(node)) not in TABLE:
        return None
    if is_update(node, key) or has_inplace_flag(node) or "out" in node.kwargs:  # autocast leaves these alone
        return None
    results = tuple(value.dtype for value in _tensors(fake(node)) if value.is_floating_point())
    return results if results and not _given(node) <= set(results[:1]) else None


def _given(node: fx.Node) -> set[torch.dtype]:
    """The dtypes of the operands that autocast may cast."""
    return {value.dtype for each in node.all_input_nodes for value in _tensors(fake(each)) if _castable(value)}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _castable(value: Any) -> bool:
    """What autocast may cast: floats, but not doubles."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64


def _signature(node: fx.Node, results: tuple[torch.dtype, ...]) -> Hashable:
    """What an operator's casts depend on: operand dtypes, and literals such as `dtype=`; sizes do not matter."""

    def said(arg: Any) -> Hashable:
        if isinstance(arg, fx.Node):
            return tuple((value.dtype, value.dim() == 0) for value in _tensors(fake(arg)))
        if isinstance(arg, (tuple, list)):
            return tuple(map(said, arg))
        return str(arg) if isinstance(arg, (torch.dtype, str)) else type(arg)

    return node.target, said(node.args), tuple((name, said(arg)) for name, arg in node.kwargs.items()), results


def _cast_to(node: fx.Node, results: tuple[torch.dtype, ...]) -> torch.dtype | str:
    """The dtype that all float operands are cast to; '' where none is, 'unknown' where neither gives the results."""
    mixed = len(_given(node)) > 1 and key_of(node) in PRODUCTS
    for to in (results[0],) if mixed else ("", results[0]):
        if _dtypes(node, to) == results:
            return to
    return "unknown"


def _dtypes(node: fx.Node, to: torch.dtype | str) -> tuple[torch.dtype, ...] | None:
    """Float dtypes of the node's results outside autocast, its float operands cast to `to`; None where it raises."""

    def given(arg: fx.Node) -> Any:
        return map_aggregate(fake(arg), lambda value: _cast(value, to))

    args, kwargs = fx.map_arg(node.args, given), fx.map_arg(node.kwargs, given)
    with _outside(node):
        try:
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                result = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError):  # operands of several dtypes
            return None
    return tuple(value.dtype for value in _tensors(result) if value.is_floating_point())


def _cast(value: Any, to: torch.dtype | str) -> Any:
    return value.to(to) if isinstance(to, torch.dtype) and _castable(value) else value


@contextlib.contextmanager
def _outside(node: fx.Node) -> Generator[None]:
    """Fake tensors, and no autocast."""
    with contextlib.ExitStack() as stack:
        values = (value for each in node.all_input_nodes for value in _tensors(fake(each)))
        traced = next((value for value in values if isinstance(value, FakeTensor)), None)
        if traced is not None:  # by Dynamo's mode: while a backend runs, torch's current one is another
            stack.enter_context(traced.fake_mode)
        stack.enter_context(outside_autocast())
        yield


def _insert(graph: fx.Graph, node: fx.Node, to: torch.dtype) -> None:
    """Casts of the node's float operands, each with the place in the user's code of the node."""

    def cast(arg: fx.Node) -> fx.Node:
        value = fake(arg)
        if not _castable(value) or value.dtype == to:
            return arg
        with graph.inserting_before(node):
            made = graph.call_method("to", (arg, to))
        made.meta = {name: node.meta[name] for name in ("stack_trace", "nn_module_stack") if name in node.meta}
        with _outside(node):
            made.meta["example_value"] = value.to(to)
        return made

    node.args = fx.map_arg(node.args, cast)
    node.kwargs = fx.map_arg(node.kwargs, cast)
