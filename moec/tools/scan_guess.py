"""Make instances of module classes without being told how, and inputs for them: free on the meta device."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moec.own_error import brief

DESCENDING, EVEN = (64, 32, 16, 8, 4, 2), (8, 8, 8, 8, 8, 8)
"""Sizes for a constructor's integers, in its own order: large ones mostly come first."""

MOST_WIDTHS = 4
"""How many of a module's own widths are tried as the width of its input."""


@dataclass(frozen=True)
class Made:
    """A class and what could be made of it; `why` not, where nothing could."""

    cls: type[nn.Module]
    models: tuple[nn.Module, ...]
    why: str = ""

    @property
    def size(self) -> int:
        """How many modules it is made of: an inner one is smaller than what holds it."""
        return sum(1 for _ in self.models[0].modules()) if self.models else 0


def instances_of(cls: type[nn.Module], given: Mapping[str, Any]) -> Made:
    """Instances without data; `given` are constructor arguments by name. Never raises for what a class does."""
    models: list[nn.Module] = []
    why = ""
    for sizes in (DESCENDING, EVEN):
        try:
            arguments = _arguments(cls, given, sizes)
            with torch.device("meta"):
                models.append(cls(**arguments).eval())
        except Exception as error:
            why = why or f"cannot be made: {brief(error)}; give --args"
            continue
        if not any(isinstance(value, int) for name, value in arguments.items() if name not in given):
            break
    return Made(cls, tuple(models), "" if models else why)


def _arguments(cls: type, given: Mapping[str, Any], sizes: tuple[int, ...]) -> dict[str, Any]:
    """A value for every parameter without a default: given, a configuration with its own defaults, or a size."""
    hints = typing.get_type_hints(cls.__init__)
    found: dict[str, Any] = {}
    left = list(sizes)
    for parameter in list(inspect.signature(cls).parameters.values()):
        if parameter.name in given:
            found[parameter.name] = given[parameter.name]
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            found[parameter.name] = _value(hints.get(parameter.name), left)
    return found


def _value(hint: Any, left: list[int]) -> Any:
    if hint is None or hint is int:
        return left.pop(0)
    if hint is float:
        return 1.0
    if hint is bool:
        return False
    if isinstance(hint, type):
        return hint()
    raise TypeError(f"no value is known for a parameter of type {hint}")


def inputs_for(model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Inputs that a module may take: rows of one of its own widths, with and without a batch, and numbers of words."""
    needed = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) > 1:
        return
    widths = dict.fromkeys(n for p in model.parameters() if p.dim() > 1 for n in (p.shape[-1], p.shape[-2]))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for width in list(widths)[:MOST_WIDTHS]:
        yield (torch.empty(2, 7, width, dtype=dtype, device="meta"),)
        yield (torch.empty(14, width, dtype=dtype, device="meta"),)
    yield (torch.empty(2, 7, dtype=torch.int64, device="meta"),)
