"""How many rows a loop collects that it picks by a mask: each of n choices is one expert's, and all have a turn.

for e in range(E): rows = where(ids == e); outs.append(f(x[rows // k]))   →   n rows in all, n numbers in ids
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from moec.capture.effects import called_name, root, viewed, written

_M = torch.ops.moec


def chosen_by_all(graph: Graph, last: Node) -> Any:
    """n where rows are those of `choices == e`, for n choices of E experts, and the loop runs over all E."""
    mask = _selecting(last)
    turn: list[Node] = []
    for node in reversed(graph.nodes):
        turn.append(node)
        if node.target in (_M.anchor.default, _M.anchor_range.default):
            break
    anchor = turn[-1]
    if mask is None or anchor.target is not _M.anchor_range.default or len(mask.args) != 2:
        return None
    choices, item = mask.args
    start, end, step, *_ = anchor.args
    if item is not anchor or not isinstance(choices, Node) or (start, step) != (0, 1):
        return None
    skips = [n for n in turn if n.target in (_M.skip.default, _M.skip_size.default)]
    idle = all(_asks(skip, mask, last) for skip in skips)
    return choices.meta["example_value"].numel() if idle and end is not None and _experts_of(choices) == end else None


def _selecting(last: Node) -> Node | None:
    """The mask `choices == e` whose places the collected rows are, where no other selects among them."""
    size, masks = str(_rows(last).meta["example_value"].shape[0]), dict[Node, None]()
    todo, seen = [last], set[Node]()
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        if called_name(here) in ("eq", "ne", "lt", "gt", "le", "ge"):
            masks[here] = None
            continue
        todo += here.all_input_nodes
    (mask,) = masks if len(masks) == 1 else (None,)
    if mask is None or called_name(mask) != "eq":
        return None
    users = [n for n in mask.users if n in seen]
    places = [_places_of(user, mask) for user in users]
    return mask if places and all(str(n) == size for n in places) else None


def _places_of(user: Node, mask: Node) -> Any:
    """How many places of a mask what reads it gives: `where(mask)`, `mask.nonzero()`, `x[mask]`; else None."""
    value = user.meta.get("example_value")
    if called_name(user) == "where" and len(user.args) == 1:
        return value[0].shape[0] if isinstance(value, tuple) else None
    if called_name(user) == "nonzero":
        return (value[0] if isinstance(value, tuple) else value).shape[0] if value is not None else None
    whole = user.target is operator.getitem and user.args[1] is mask
    return value.shape[0] if whole and isinstance(value, torch.Tensor) else None


def _asks(skip: Node, mask: Node, last: Node) -> bool:
    """Whether a turn is skipped only where its expert has no rows."""
    asked = skip.args[1]
    if skip.target is _M.skip_size.default:
        size = asked.meta["example_value"] if isinstance(asked, Node) else asked
        return str(size) == str(_rows(last).meta["example_value"].shape[0])
    while isinstance(asked, Node) and called_name(asked) in ("logical_not", "any") and len(asked.args) == 1:
        asked = asked.args[0]
    return asked is mask


def _experts_of(choices: Node) -> Any:
    """How many experts whole numbers name, each one of them, or None."""
    made: Node | None = choices
    while made is not None and called_name(made) in _SAME:
        if made.meta["example_value"].dtype not in (torch.int64, torch.int32):
            return None  # a narrower number may be another expert's
        made = _node(made.args[0])
    if made is None or _is_written(root(made)):
        return None
    if called_name(made) == "argmax":
        return _size_along(made)
    of = _node(made.args[0]) if made.target is operator.getitem and made.args[1] == 1 else None
    return _size_along(of) if of is not None and called_name(of) in ("max", "topk") else None


def _size_along(made: Node) -> Any:
    """The size of the axis that a maximum, or a top-k, is taken along."""
    given = dict(zip(_GIVEN[called_name(made)], made.args, strict=False)) | dict(made.kwargs)
    size, dim = _node(given.get("input")), given.get("dim", -1 if called_name(made) == "topk" else None)
    return size.meta["example_value"].shape[dim] if size is not None and isinstance(dim, int) else None


def _is_written(source: Node) -> bool:
    """Whether anything is written into a tensor, or into a view of it, in the graph so far."""
    todo = [source]
    while todo:
        here = todo.pop()
        if any(here in written(user) for user in here.users):
            return True
        todo += [user for user in here.users if viewed(user) is here]
    return False


_GIVEN = {"topk": ("input", "k", "dim"), "max": ("input", "dim"), "argmax": ("input", "dim")}
_SAME = frozenset(("view", "reshape", "flatten", "squeeze", "ravel", "to", "long", "int", "contiguous", "detach"))


def _rows(collect: Node) -> Node:
    rows = collect.args[0]
    assert isinstance(rows, Node)
    return rows


def _node(value: Any) -> Node | None:
    return value if isinstance(value, Node) else None
