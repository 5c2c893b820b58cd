"""After lowering: a layer's op becomes one that sends rows to the ranks of their experts, where the options ask for it.

One op takes the place of one op, so a graph has as many nodes for 1024 ranks as for two. The proof of a rewrite never
sees it: what is proved runs on one rank.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx

import moec.spread.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  # defines the ops
from moec.errors import OptionError, ParseError
from moec.exchange.placement import Placements, read_placements
from moec.exchange.process_groups import group_named
from moec.exchange.travel import Exchange
from moec.ir.spec import KernelSpec
from moec.options import Options
from moec.passes.raising.raise_graph import fake

_M = torch.ops.moec
SITES = (_M.moe.default, _M.experts.default, _M.experts_training.default)
SPREAD = _M.spread_experts.default


@dataclass(frozen=True)
class Spreading:
    """What the options say of ranks: the group's name, where experts are, how many ranks share a node."""

    group: str
    placements: Placements
    ranks_per_node: int

    @staticmethod
    def of(options: Options) -> Spreading | None:
        """None where experts are not to be spread. Raises OptionError for a group, ParseError for a placement."""
        if not options.experts_over:
            return None
        ranks = group_named(options.experts_over).size()
        read = read_placements(Path(options.placement)) if options.placement else Placements(ranks)
        return Spreading(options.experts_over, read, options.ranks_per_node)

    def exchange(self, layer: str, experts: int) -> Exchange:
        """How the rows of one layer travel; raises OptionError where its placement does not fit."""
        try:
            placement = self.placements.of(layer, experts)
        except ParseError as error:
            raise OptionError(f"option placement: {error}") from error
        return Exchange(layer, self.group, placement, self.ranks_per_node)


def spread(gm: fx.GraphModule, spreading: Spreading, layers: Sequence[str]) -> tuple[str, ...]:
    """Rewrite the ops of `layers` in `gm`, named in execution order; what is to be said of each."""
    said: list[str] = []
    ops = [node for node in gm.graph.nodes if node.target in SITES]
    for node, layer in zip(ops, layers, strict=True):
        exchange = spreading.exchange(layer, _experts(node))
        _replace(gm.graph, node, exchange)
        said.append(exchange.summary)
    if said:
        gm.graph.lint()
        gm.recompile()
    return tuple(said)


def _experts(node: fx.Node) -> int:
    """E, from the parameters of the layer's op."""
    moe = node.target is _M.moe.default
    params = cast("list[fx.Node]", node.args[2 if moe else 3])
    spec = KernelSpec.parse(str(node.args[4])).experts
    first = fake(params[0])
    assert isinstance(first, torch.Tensor)
    return int(first.shape[0]) if spec.stacked else len(params) // len(spec.param_groups)


def _replace(graph: fx.Graph, node: fx.Node, exchange: Exchange) -> None:
    if node.target is _M.moe.default:
        x, router, params, k, spec, engine = node.args
        with graph.inserting_before(node):
            routed = _call(graph, node, _M.route.default, (x, router, k, spec))
            logits, weights, experts = (_call(graph, node, operator.getitem, (routed, i)) for i in range(3))
            y = _call(graph, node, SPREAD, (x, weights, experts, params, _alone(str(spec)), engine, str(exchange)))
        _results(node, (y, logits, weights, experts))
        return
    operands = node.args[:6]  # without what the option `save` says: nothing but operands is kept for backward
    with graph.inserting_before(node):
        y = _call(graph, node, SPREAD, (*operands, str(exchange)))
    if node.target is _M.experts.default:
        node.replace_all_uses_with(y)
        graph.erase_node(node)
    else:
        _results(node, (y,))


def _alone(spec: str) -> str:
    """The experts of a layer whose router runs apart."""
    parsed = KernelSpec.parse(spec)
    return str(KernelSpec(parsed.experts, None, parsed.y_dtype))


def _call(graph: fx.Graph, like: fx.Node, target: object, args: tuple[object, ...]) -> fx.Node:
    made = graph.create_node("call_function", cast(Any, target), cast(Any, args))
    made.meta.update({k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack")})
    return made


def _results(node: fx.Node, results: tuple[fx.Node, ...]) -> None:
    """Readers of an op's results read these, and the op is gone."""
    for item in list(node.users):
        item.replace_all_uses_with(results[cast(int, item.args[1])])
        node.graph.erase_node(item)
    node.graph.erase_node(node)
