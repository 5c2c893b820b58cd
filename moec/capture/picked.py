"""One expert out of E, symbolic: the first module's code with each parameter picked out of all modules' parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.comptime import comptime
from torch.func import functional_call

from moec.capture.keys import NameKey, TextKey
from moec.capture.lift import lift, same_method

_markers: Any = torch.ops.moec


class Picked:
    """A module, or a part of one, whose tensors belong to the loop's current item."""

    def __init__(self, key: str, first: nn.Module, picks: dict[str, Tensor]) -> None:
        self._moec_key = key
        self._moec_first = first
        self._moec_picks = picks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._moec_first, self._moec_picks, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_moec_"):  # Dynamo also asks an object that was never initialised
            raise AttributeError(name)
        picks = self._moec_picks
        if name in picks:
            return picks[name]
        value = getattr(self._moec_first, name)
        if isinstance(value, nn.Module):
            prefix = name + "."
            return Picked(
                self._moec_key, value, {n[len(prefix) :]: t for n, t in picks.items() if n.startswith(prefix)}
            )
        if name not in self._moec_first.__dict__ and callable(value):
            from moec.capture.trace import give_up

            give_up(self._moec_key, "the body calls a method of an expert other than its forward")
        return value

    def __getitem__(self, at: int | str) -> Any:
        """A part of a container: the layers of a Sequential, the parts of a ModuleDict, listed parameters."""
        return getattr(self, at if isinstance(at, str) else self._moec_parts()[at])

    def __len__(self) -> int:
        return len(self._moec_parts())

    def __iter__(self) -> Any:
        return iter([getattr(self, name) for name in self._moec_parts()])

    def _moec_parts(self) -> list[str]:
        first = self._moec_first
        return [*first._modules, *first._parameters]


def expects(key: str, obj: Any, name: str, where: str) -> None:
    """Traced in a body where a method of `obj` is written out: it is still the one that stands at `where`."""
    comptime(same_method)  # reads key, obj, name and where


def _expect_all(experts: Any, names: list[str]) -> None:
    """A function of its own: what a comprehension reads would be no local that `lift` finds."""
    if not all(name in experts for name in names):
        raise KeyError("the loop runs over names that are no experts")


def pick_from(key: str, obj: Any, at: Any) -> Any:
    """`obj[at]` for a list of modules or tensors and a symbolic item: a `Picked`, or `moec::pick` of the tensors."""
    names: Any = ()
    tables: Any = ()
    _first, _at = 0, at  # a local that no comprehension reads
    by_key = isinstance(at, TextKey | NameKey)
    item = at.item if by_key else at
    _wanted = at.wanted(len(obj)) if by_key else []
    if isinstance(at, NameKey):
        _expect_all(obj, at.names)
    comptime(lift)  # reads key, obj, _at and _wanted; sets names, tables and _first, or gives the loop up
    picks: dict[str, Tensor] = {
        name: _markers.pick.default(list(table), item) for name, table in zip(names, tables, strict=True)
    }
    if names == ("",):
        return picks[""]
    if by_key:
        return Picked(key, obj[_wanted[0]], picks)
    return Picked(key, next(iter(obj.values())) if isinstance(obj, nn.ModuleDict) else obj[_first], picks)
