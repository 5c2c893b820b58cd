"""Whether a graph can hold experts at all: one cheap look at torch's nodes, before anything is raised.

Whatever the spelling, a layer of experts computes numbers from a choice: rows by indices, products by a mask. A graph
in which no node reads whole numbers or a mask and gives floats has no such layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from moec.passes.raising.raise_graph import fake
from moec.passes.raising.words import key_of


def can_hold_experts(graph: fx.Graph) -> bool:
    """False only where no pass could find anything; looking up embeddings is no choice."""
    return any(
        node.op.startswith("call_")
        and any(map(_may_choose, node.all_input_nodes))
        and _may_be_float(node)
        and key_of(node) != "embedding"
        for node in graph.nodes
    )


def _may_choose(node: fx.Node) -> bool:
    """Whether a value holds whole numbers or a mask, as far as is known."""
    value = fake(node)
    return value is None or any(not _floats(each) for each in _tensors(value))


def _may_be_float(node: fx.Node) -> bool:
    value = fake(node)
    return value is None or any(map(_floats, _tensors(value)))


def _floats(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
