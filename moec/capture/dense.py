"""A loop that runs an expert on every token, where some token chose it: it selects no rows, and adds gated sums.

for e in range(E):
    mask = ids == e
    if mask.any():
        y += (w * mask).sum(-1, keepdim=True) * experts[e](x)

Without the question Dynamo writes such a loop out in one graph; with it, every expert would break the graph.
"""

from __future__ import annotations

import ast

from moec.capture.asks import asks_for_rows, picks_rows
from moec.capture.events import called, loaded, stored
from moec.capture.rebinds import adds, flat, recast, updates


def dense_sums(loop: ast.For, rebound: set[str], aliases: set[str], selected: set[str], tainted: set[str]) -> list[str]:
    """The names that the loop adds to whatever its item makes, in order; none where it does not ask for rows.

    rebound   what is carried from one iteration to the next      aliases  names of the item
    selected  names of masks and rows that the item selects       tainted  names that depend on the item
    """
    tests = [stmt.test for stmt in flat(loop.body) if isinstance(stmt, ast.If)]
    asks = any(asks_for_rows(test, aliases, selected) for test in tests)
    if not asks and not picks_rows(loop, selected) and not _runs_over_numbers(loop):
        return []
    made = tainted | stored(loop.body)
    found: list[str] = []
    for name in sorted(rebound):
        bound = [stmt for stmt in updates(loop, name) if not recast(stmt, name)]
        own = bound and all(adds(stmt, name) for stmt in bound)
        if own and all((loaded([stmt]) - {name}) & made for stmt in bound):
            found.append(name)
    return found


def _runs_over_numbers(loop: ast.For) -> bool:
    """Whether a loop runs over numbers of a tensor: `for e in ids.unique()`."""
    return any(called(node) in ("unique", "nonzero", "flatnonzero", "tolist") for node in ast.walk(loop.iter))
