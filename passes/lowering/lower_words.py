"""How small instructions that passes add beside a site are said in FX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moec.ir.dtypes import GRAPH_DTYPES
from moec.ir.expr import POINTWISE
from moec.ir.graph import Dim, Instr

Make = Callable[[fx.Graph, Instr, list[Any]], fx.Node]
"""Makes the FX node of an instruction from its operands, which are nodes, lists of nodes, or literals."""


def _reshape(graph: fx.Graph, instr: Instr, args: list[Any]) -> fx.Node:
    if len(args) == 2 and dict(instr.attrs).get("tail"):
        return graph.call_function(over_tokens, (*args, instr.attr("tail")))
    if len(args) == 2:
        size = graph.call_method("size", (args[1],))
        with graph.inserting_after(size):
            return graph.call_method("reshape", (args[0], size))
    attrs = dict(instr.attrs)
    if "adds" in attrs:
        return _unit_axes(graph, args[0], attrs["drops"], attrs["adds"])
    return graph.call_method("reshape", (args[0], [_size(d) for d in instr.types[0].shape]))


def over_tokens(value: torch.Tensor, tokens: torch.Tensor, tail: tuple[int, ...]) -> torch.Tensor:
    """value[T, …] of tokens[…, H] → the tokens' axes, then those of `tail`."""
    return value.reshape(*tokens.shape[:-1], *tail)


def _unit_axes(graph: fx.Graph, value: fx.Node, drops: Any, adds: Any) -> fx.Node:
    """Axes of size 1 dropped, then others added."""
    steps = [("squeeze", (tuple(drops),))] if drops else []
    steps += [("unsqueeze", (axis,)) for axis in adds]
    node = graph.call_method(steps[0][0], (value, *steps[0][1]))
    for name, rest in steps[1:]:
        with graph.inserting_after(node):
            node = graph.call_method(name, (node, *rest))
    return node


def _size(dim: Dim) -> int:
    """The size as a number; −1, of which a reshape may have one, where it is symbolic."""
    return int(dim) if dim.is_Integer else -1


def _below(graph: fx.Graph, instr: Instr, args: list[Any]) -> fx.Node:
    size = graph.call_method("size", (args[1], 0))
    with graph.inserting_after(size):
        return graph.call_function(torch.lt, (args[0], size))


def _call(function: Callable[..., Any], *names: str) -> Make:
    def make(graph: fx.Graph, instr: Instr, args: list[Any]) -> fx.Node:
        return graph.call_function(function, (*args, *(instr.attr(name) for name in names)))

    return make


def _sum(graph: fx.Graph, instr: Instr, args: list[Any]) -> fx.Node:
    """With its dtype, or autocast would choose one."""
    dims, keepdim, dtype = instr.attr("dims"), instr.attr("keepdim"), GRAPH_DTYPES[instr.types[0].dtype]
    return graph.call_function(torch.sum, (args[0], dims, keepdim), {"dtype": dtype})


def _cast(graph: fx.Graph, instr: Instr, args: list[Any]) -> fx.Node:
    return graph.call_method("to", (args[0], GRAPH_DTYPES[str(instr.attr("dtype"))]))


def _gather(graph: fx.Graph, instr: Instr, args: list[Any]) -> fx.Node:
    return graph.call_function(torch.gather, (args[0], instr.attr("dim"), args[1]))


def expert_of_rows(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """rows[…, E, …, H], experts on axis `dim` → the expert of each row, [rows, 1]."""
    experts = torch.arange(rows.shape[dim], device=rows.device)
    shape = [-1 if axis == dim else 1 for axis in range(rows.dim() - 1)]
    return experts.view(shape).expand(rows.shape[:-1]).reshape(-1, 1)


def ones_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """rows[…, H] → 1 for each row, [rows, 1]."""
    return rows.new_ones((rows.shape[:-1].numel(), 1))


def experts_where(mask: torch.Tensor) -> torch.Tensor:
    """mask[T, E] → the expert of each slot, −1 where it is not chosen: [T, E]."""
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1)


def each_token(pairs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """pairs[B, k] of sequences whose tokens are rows[B·S, H] → [B·S, k]."""
    count = rows.shape[0] // max(pairs.shape[0], 1)
    return pairs[:, None].expand(-1, count, -1).flatten(0, 1)


def expand_over(value: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """value[…] or value[…, k], axes of size 1 where tokens[…, H] share a number → one for each token."""
    lead = tokens.shape[:-1]
    return value.expand(*lead, *value.shape[len(lead) :])


def first_of_each(choice: torch.Tensor, most: int, experts: int, by_slot: bool) -> torch.Tensor:
    """choice[T, k] → −1 where as many as `most` pairs before it, by token or by slot, chose the same of E experts."""
    pairs = choice.t() if by_slot else choice
    hot = pairs.reshape(-1, 1) == torch.arange(experts, device=choice.device)
    kept = (hot & (hot.cumsum(0) <= most)).any(1).view(pairs.shape)
    return torch.where(kept.t() if by_slot else kept, choice, -1)


WORDS: Mapping[str, Make] = {
    **{word: _call(function.eager) for word, function in POINTWISE.items() if function.arity == 1},
    "reshape": _reshape,
    "permute": _call(torch.permute, "dims"),
    "cast": _cast,
    "gather": _gather,
    "mul": _call(torch.mul),
    "sub": _call(torch.sub),
    "ge": _call(torch.ge),
    "lt": _call(torch.lt),
    "gt": _call(torch.gt),
    "le": _call(torch.le),
    "ne": _call(torch.ne),
    "eq": _call(torch.eq),
    "experts_where": _call(experts_where),
    "narrow": _call(torch.narrow, "dim", "start", "length"),
    "reduce_sum": _sum,
    "bitwise_and": _call(torch.bitwise_and),
    "bitwise_or": _call(torch.bitwise_or),
    "invert": _call(torch.bitwise_not),
    "where": _call(torch.where),
    "below": _below,
    "cat": _call(torch.cat, "dim"),
    "expert_of_rows": _call(expert_of_rows, "dim"),
    "zeros_like": _call(torch.zeros_like),
    "expand_over": _call(expand_over),
    "ones_of_rows": _call(ones_of_rows),
    "each_token": _call(each_token),
    "first_of_each": _call(first_of_each, "experts", "by_slot"),
    "expand_as": lambda graph, instr, args: graph.call_method("expand_as", tuple(args)),
}
