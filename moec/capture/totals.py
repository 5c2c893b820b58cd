"""How many rows a loop collects: counts of n choices cut n rows, however they were counted."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from moec.capture.picked_totals import chosen_by_all
from moec.capture.state import current_tx

_M = torch.ops.moec
_SAME = frozenset(("to", "long", "int", "cpu", "float", "type", "contiguous", "clone", "detach"))


@torch.compiler.assume_constant_result
def fix_last_total() -> None:
    """The same for the graph that Dynamo is tracing; traced."""
    fix_total(current_tx().output.graph)


def fix_total(graph: Graph) -> None:
    """Tell torch the size of the last collected tensor of the graph, where the counts that cut its rows give it."""
    last = next(node for node in reversed(graph.nodes) if node.target is _M.collect.default)
    spans, sources = _cuts(last)
    totals = [_total(_counts(span)) for span in spans]
    rows = [source.meta["example_value"].shape[0] for source in sources]
    cut = last.args[0]
    assert isinstance(cut, Node)
    # The body must have kept the number of rows: its size is then that of the span.
    same = any(span.meta["example_value"].shape[0] is cut.meta["example_value"].shape[0] for span in spans)
    if len(totals) == 1 and totals[0] is not None and len(rows) == 1 and (same or _kept(spans[0], cut)):
        torch._check(last.meta["example_value"].shape[0] == totals[0])
    chosen = chosen_by_all(graph, last) if not spans else None
    if chosen is not None:
        torch._check(last.meta["example_value"].shape[0] == chosen)
    beside = _beside(graph, last)
    if beside is not None:
        torch._check(last.meta["example_value"].shape[0] == beside.meta["example_value"].shape[0])


def _beside(graph: Graph, last: Node) -> Node | None:
    """Another tensor that the same loop collects, as many rows a turn."""
    for node in reversed(graph.nodes):
        if node.target in (_M.anchor.default, _M.anchor_range.default):
            return None
        if node is not last and node.target is _M.collect.default and _kept(_first(node), _first(last)):
            return node
    return None


def _first(collect: Node) -> Node:
    rows = collect.args[0]
    assert isinstance(rows, Node)
    return rows


def _kept(span: Node, rows: Node) -> bool:
    a, b = span.meta["example_value"].shape[0], rows.meta["example_value"].shape[0]
    return str(a) == str(b)


def _cuts(node: Node) -> tuple[list[Node], list[Node]]:
    """The spans that the rows were cut at, and what they were cut from."""
    spans: dict[Node, None] = {}
    sources: dict[Node, None] = {}
    todo, seen = [node], set[Node]()
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        index = here.args[1] if here.target is operator.getitem else None
        if isinstance(index, Node) and index.target is _M.span.default and isinstance(here.args[0], Node):
            spans[index] = None
            sources[here.args[0]] = None
            continue
        todo += here.all_input_nodes
    return list(spans), list(sources)


def _counts(span: Node) -> Node | None:
    """The counts behind the bounds of a span: `start + take(counts)` or `take(cumsum(counts))`."""
    stop = _plain(span.args[1])
    if stop is not None and stop.target in (operator.add, torch.add):
        looked = [a for a in stop.args if isinstance(a, Node) and a.target is _M.take.default]
        return _node(looked[0].args[0]) if len(looked) == 1 else None
    if stop is None or stop.target is not _M.take.default:
        return None
    ends = _plain(stop.args[0])
    return _node(ends.args[0]) if ends is not None and ends.target == "cumsum" else None


def _total(counts: Node | None) -> Any:
    """The sum of counts, where it is known to be a size."""
    made = _plain(counts)
    if made is None:
        return None
    name = getattr(made.target, "__name__", made.target)
    if name == "bincount" and len(made.args) + len(made.kwargs) <= 2 and "weights" not in made.kwargs:
        return _numel(made.args[0])
    if name in ("scatter_add", "scatter_add_") and len(made.args) == 4:
        return _ones_added(made)
    if name == "histc":
        return _all_binned(made)
    if name != "sum":
        return None
    mask = _plain(made.args[0], _SAME | {"bool"})  # of a mask of zeros and ones
    dims = made.kwargs.get("dim", made.args[1] if len(made.args) > 1 else None)
    if mask is None:
        return None
    rank = mask.meta["example_value"].dim()
    if getattr(mask.target, "__name__", "") == "one_hot" and _all_but_last(dims, rank):
        return _numel(mask.args[0])
    return _chosen_once(mask) if dims in (0, (0,), [0]) else None


def _ones_added(made: Node) -> Any:
    """`zeros.scatter_add_(0, choices, ones)` counts each choice once."""
    base, _dim, choices, ones = made.args
    filled = _node(ones) is not None and "ones" in _called(_node(ones))
    return _numel(choices) if filled and "zeros" in _called(_node(base)) else None


def _all_binned(made: Node) -> Any:
    """`histc(choices, bins=E, min=0, max=E or E - 1)` counts each choice of E experts."""
    given = dict(zip(("input", "bins", "min", "max"), made.args, strict=False)) | dict(made.kwargs)
    chosen = _plain(given["input"])
    while chosen is not None and chosen.op == "call_method" and chosen.target in ("view", "reshape", "flatten"):
        chosen = _plain(chosen.args[0])
    last = _from_topk(chosen)
    bins, low, high = (given.get(k) for k in ("bins", "min", "max"))
    whole = last is not None and last == bins and low == 0 and high in (bins, last - 1)
    return _numel(_node(given["input"])) if whole else None


def _from_topk(chosen: Any) -> Any:
    """How many experts the indices of a top-k may name, or None."""
    made = _node(chosen.args[0]) if isinstance(chosen, Node) and chosen.target is operator.getitem else None
    if made is None or _called(made) != "topk":
        return None
    dim = made.kwargs.get("dim", made.args[2] if len(made.args) > 2 else -1)
    size = _node(made.args[0] if made.args else made.kwargs.get("input"))
    return None if size is None else size.meta["example_value"].shape[dim]


def _called(node: Node | None) -> str:
    return "" if node is None else str(getattr(node.target, "__name__", node.target))


def _chosen_once(mask: Node) -> Any:
    """`zeros.scatter_(1, topk's indices, 1)`: as many ones as choices, since no row chooses twice."""
    if mask.target not in ("scatter_", "scatter"):
        writes = [u for u in mask.users if u.target == "scatter_" and u.args[0] is mask]
        if len(writes) != 1:
            return None
        mask = writes[0]
    if len(mask.args) != 4 or mask.args[1] != 1 or mask.args[3] != 1:
        return None
    chosen, base = mask.args[2], _node(mask.args[0])
    made = _node(chosen.args[0]) if isinstance(chosen, Node) and chosen.target is operator.getitem else None
    of_topk = made is not None and getattr(made.target, "__name__", made.target) == "topk"
    empty = base is not None and "zeros" in str(getattr(base.target, "__name__", base.target))
    return _numel(chosen) if of_topk and empty else None


def _all_but_last(dims: Any, rank: int) -> bool:
    given = (dims,) if isinstance(dims, int) else dims
    return given is not None and sorted(d % rank for d in given) == list(range(rank - 1))


def _numel(node: Any) -> Any:
    return node.meta["example_value"].numel() if isinstance(node, Node) else None


def _node(value: Any) -> Node | None:
    return value if isinstance(value, Node) else None


def _plain(value: Any, same: frozenset[str] = _SAME) -> Node | None:
    """The node without casts and copies."""
    node = _node(value)
    while node is not None and node.op == "call_method" and node.target in same:
        node = _node(node.args[0])
    return node
