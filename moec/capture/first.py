"""The first of a loop's rows, in place of a branch that asks whether there are more."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def first(key: str, how: str, asked: Any, rows: Any, most: Any) -> Any:
    """`rows[:most] if len(asked) > most else rows`; how: `len`, or `numel`, which says the same of a vector."""
    from moec.capture.trace import give_up

    if not isinstance(asked, Tensor) or not isinstance(rows, Tensor) or isinstance(most, Tensor):
        give_up(key, "the body asks for more rows than some number of something that is no tensor")
    if rows.dim() == 0 or asked.dim() == 0 or (how == "numel" and asked.dim() != 1):
        give_up(key, "the body compares a number of elements with a number of rows")
    if not statically_known_true(rows.shape[0] == asked.shape[0]):
        give_up(key, "the body cuts other rows than it has counted")
    return rows[:most]
