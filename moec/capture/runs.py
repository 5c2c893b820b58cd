"""Rows cut by counts that stay on the device, in place of `rows.split(counts.tolist())`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.capture.numbers import counted


class Runs:
    """`rows.split(sizes)`: run i is the next `sizes[i]` rows. rows [R, …], sizes [n], the sum of which is R."""

    def __init__(self, rows: Tensor, sizes: Tensor) -> None:
        self.rows = rows
        self.sizes = sizes
        self.ends = sizes.cumsum(0)


def runs(rows: Tensor, sizes: Any) -> Any:
    """`rows.split(sizes.tolist())` with sizes that stay on the device; a plain split where they came from no tensor."""
    counts = sizes if isinstance(sizes, Tensor) else counted(sizes)
    return rows.split(sizes) if counts is None else Runs(rows, counts)


def runs_of_first(rows: Tensor, sizes: Any) -> Any:
    """`rows[:sum(sizes)].split(sizes)`: there may be more rows than the sizes count."""
    counts = sizes if isinstance(sizes, Tensor) else counted(sizes)
    return rows[: sum(sizes)].split(sizes) if counts is None else Runs(rows, counts)
