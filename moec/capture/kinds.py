"""Experts of several kinds in one list: the loop is traced once for each kind, over the experts of that kind.

experts = [Mlp, Mlp, Mlp, Identity]        for e in range(3, 4): y.index_add_(0, rows, w * x[rows])
for e in range(4): y.index_add_(…)    →    for e in range(3): y.index_add_(0, rows, w * mlp_e(x[rows]))

Each of these loops runs over all items and skips those of other kinds. Sums come in another order, so only a loop that
only adds is traced so (`moec.capture.roll`). Kinds without parameters come first: what they add is where the sum of the
others begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moec.capture.alike import difference
from moec.capture.state import current_tx, kinds_of, loops_of

MOST = 4
"""Lists of more kinds than this are no experts beside a few that compute next to nothing."""

_markers: Any = torch.ops.moec
_SAME_ITEM = (torch.ops.moec.skip.default, torch.ops.moec.skip_size.default, "reshape")
_ANCHORS = (torch.ops.moec.anchor.default, torch.ops.moec.anchor_range.default)


def kinds_among(experts: Sequence[nn.Module]) -> tuple[tuple[int, int], ...]:
    """Each run of like experts, from one on and before another; those of the fewest tensors first. () for too many."""
    starts = [0]
    for i in range(1, len(experts)):
        if difference([experts[starts[-1]], experts[i]]) is not None:
            starts.append(i)
    runs = list(zip(starts, [*starts[1:], len(experts)], strict=True))
    if not 1 < len(runs) <= MOST or all(stop - start < 2 for start, stop in runs):
        return ()
    return tuple(sorted(runs, key=lambda run: sum(1 for _ in experts[run[0]].parameters())))


@torch.compiler.assume_constant_result
def _count(key: str) -> int:
    return len(kinds_of(current_tx()).get(key, ())) or 1


@torch.compiler.assume_constant_result
def _begin(key: str, kind: int) -> int:
    """From which expert on a kind is; it is the one that the body is traced for now."""
    loops, known = loops_of(current_tx()), kinds_of(current_tx()).get(key)
    loops.kind = (0, 0) if known is None else known[kind]
    return loops.kind[0]


@torch.compiler.assume_constant_result
def _end(key: str, kind: int) -> int:
    """Before which expert a kind is; 0 where none of another kind stands behind it."""
    known = kinds_of(current_tx()).get(key, ())
    stop = known[kind][1] if known else 0
    return stop if any(start >= stop for start, _ in known) else 0


def kinds(key: str) -> range:
    """The kinds of experts that a loop runs over, as far as its earlier traces told."""
    return range(_count(key))


def only(key: str, kind: int, item: Tensor) -> None:
    """Where the loop's item is an expert of another kind its iteration ends here."""
    start = _begin(key, kind)
    stop = _end(key, kind)
    if start > 0:
        _markers.skip.default(item, item.reshape(()) < start)
    if stop > 0:
        _markers.skip.default(item, item.reshape(()) >= stop)


def is_item(node: Any) -> bool:
    """Whether a node of the graph is the loop's item itself."""
    while isinstance(node, fx.Node) and node.target in _SAME_ITEM:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in _ANCHORS
