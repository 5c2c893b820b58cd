"""Whether a loop's item is among numbers: `e in ids.unique()`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def member(item: Any, held: Any, outside: bool) -> Tensor:
    """`item in held` (outside: `item not in held`) of a tensor of whole numbers."""
    if not isinstance(held, Tensor) or held.is_floating_point() or held.dtype == torch.bool:
        raise TypeError("the body asks whether the item is in something that is no tensor of whole numbers")
    found = (held == item).any()
    return torch.logical_not(found) if outside else found


def distinct(numbers: Tensor) -> Tensor:
    """`set(numbers)` of whole numbers that stayed a tensor."""
    return torch.unique(numbers)
