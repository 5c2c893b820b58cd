"""The marker ops of a rolled loop: they live only in captured graphs and say "for each item: run this region"."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

_LIBRARY = torch.library.Library("moec", "FRAGMENT")

_SCHEMAS: tuple[str, ...] = (
    # One row of `items` [n, ...] as int64: the region that follows runs for each row, in order.
    "anchor(Tensor items) -> Tensor",
    # One integer of range(start, end, step), 0-d int64: the region runs for each, in order.
    "anchor_range(SymInt start, SymInt end, SymInt step, Device device) -> Tensor",
    # table[item] for a 0-d integer item.
    "take(Tensor table, Tensor item) -> Tensor",
    # tables[item] of E tensors of one shape, e.g. the same parameter of E experts.
    "pick(Tensor[] tables, Tensor item) -> Tensor",
    # The item unchanged; where cond (one element) is true, the rest of this iteration is skipped.
    "skip(Tensor item, Tensor cond) -> Tensor",
    # The item unchanged; where size == 0, the rest of this iteration is skipped.
    "skip_size(Tensor item, SymInt size) -> Tensor",
    # Head of the loop: `value` at the first iteration, afterwards what `yield_` handed over.
    "carry(Tensor value, Tensor item) -> Tensor",
    # The same for a whole number: 0-d int64.
    "carry_int(SymInt value, Tensor item) -> Tensor",
    # The integers start ≤ i < stop of 0-d bounds, as int64.
    "span(Tensor start, Tensor stop) -> Tensor",
    # After the loop: `rows` of every iteration, one after the other, along the first axis.
    "collect(Tensor rows, Tensor item) -> Tensor",
    # End of the loop: `new` becomes the next iteration's `carried`; the result is the value after the last one.
    "yield_(Tensor carried, Tensor new, Tensor item) -> Tensor",
    # The region of this item ends here.
    "end(Tensor item) -> ()",
)

# These act by their place in the graph, so no pass may drop them for want of users.
_ORDERED = ("anchor", "anchor_range", "skip", "skip_size", "carry", "carry_int", "collect", "yield_", "end")


def _anchor(items: Tensor) -> Tensor:
    return items.new_empty(items.shape[1:], dtype=torch.int64)


def _anchor_range(start: int, end: int, step: int, device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def _take(table: Tensor, item: Tensor) -> Tensor:
    # Strides as in eager, where table[item] is a view.
    return table.new_empty_strided(table.shape[1:], table.stride()[1:])


def _pick(tables: list[Tensor], item: Tensor) -> Tensor:
    return torch.empty_like(tables[0])


def _same(item: Tensor, *_: object) -> Tensor:
    return torch.empty_like(item)


def _carry_int(value: int, item: Tensor) -> Tensor:
    return item.new_empty((), dtype=torch.int64)


def _span(start: Tensor, stop: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return start.new_empty((size,), dtype=torch.int64)


def _collect(rows: Tensor, item: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty((size, *rows.shape[1:]))


def _yield(carried: Tensor, new: Tensor, item: Tensor) -> Tensor:
    return torch.empty_like(new)


_FAKES: dict[str, Callable[..., Tensor | None]] = {
    "anchor": _anchor,
    "anchor_range": _anchor_range,
    "take": _take,
    "pick": _pick,
    "skip": _same,
    "skip_size": _same,
    "carry": _same,
    "carry_int": _carry_int,
    "span": _span,
    "collect": _collect,
    "yield_": _yield,
    "end": lambda item: None,
}


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"moec::{name} was called on real tensors, expected only graphs: it marks a rolled loop; "
        "run the graph through moec.capture.region.lower_regions first"
    )


def _register() -> None:
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        torch.library.register_fake(f"moec::{name}", _FAKES[name], lib=_LIBRARY)
        _LIBRARY.impl(name, lambda *_, _name=name, **__: _refuse(_name), "CompositeExplicitAutograd")
        if name in _ORDERED:
            has_side_effect(getattr(torch.ops.moec, name).default)


_register()
