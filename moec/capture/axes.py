"""Which axis of a tensor each part of an index reads; parts that depend on a loop's item."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def narrows(part: Any) -> bool:
    """Whether a part of an index does more than to stand for a whole axis."""
    return not isinstance(part, slice) or part != slice(None)


def axis_of(parts: list[Any], place: int, dims: int) -> int:
    """Which of a tensor's `dims` axes the part at `place` of an index selects from."""
    if any(part is Ellipsis for part in parts[:place]):
        return dims - sum(_consumed(part) for part in parts[place:])
    return sum(_consumed(part) for part in parts[:place])


def _consumed(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


class One:
    """`item:item + 1` of the loop's item: its place in an axis, which stays as one of size 1."""

    def __init__(self, item: Tensor) -> None:
        self.item = item


class Span:
    """`start:stop` with a bound that depends on the item: Python's own slice would ask the tensor for its number."""

    def __init__(self, start: Any, stop: Any, step: Any) -> None:
        self.start = start
        self.stop = stop
        self.step = step


def one(item: Any) -> Any:
    """`item:item + 1` of an index."""
    return One(item) if isinstance(item, Tensor) else slice(item, item + 1)


def span(start: Any, stop: Any, step: Any) -> Any:
    """`start:stop:step` of an index."""
    if isinstance(start, Tensor) or isinstance(stop, Tensor):
        return Span(start, stop, step)
    return slice(start, stop, step)
