"""An op's parameters as kernels see them: sizes checked, and where they lie worked out once for those that stay.

Letters: H hidden, F expert width, O output width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from moec.errors import CodegenError
from moec.ir.spec import ExpertsSpec, widths

B = TypeVar("B")

_MOST = 4096  # layers that one kernel remembers


class Bindings(Generic[B]):
    """What `bind` makes of a spec's parameters, kept while `keeps` allows it, by where the tensors lie in memory."""

    def __init__(self, s: ExpertsSpec, bind: Callable[[Sequence[Tensor]], B], keeps: Callable[[B], bool]) -> None:
        self._groups, self._bind, self._keeps = len(s.param_groups), bind, keeps
        self._known: dict[tuple[object, ...], B] = {}

    def of(self, params: Sequence[Tensor]) -> B:
        """The binding of these parameters; raises what `bind` raises."""
        key = (tuple(map(Tensor.data_ptr, params)), how_they_lie(params, self._groups))
        bound = self._known.get(key)
        if bound is None:
            bound = self._bind(params)
            if self._keeps(bound):
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[key] = bound
        return bound


def how_they_lie(params: Sequence[Tensor], groups: int) -> tuple[object, ...]:
    """Shape and strides of each group's first tensor: a parameter may be set to a view of the memory that it had.

    To ask all tensors of experts that are modules would take longer than their addresses do.
    """
    return tuple([(p.shape, p.stride()) for p in params[:: max(len(params) // groups, 1)]])


def checked_sizes(s: ExpertsSpec, params: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """(E, H, F, O) of the parameters.

    Raises CodegenError where one has not the shape that the others imply: a kernel would read past it.
    """
    groups = s.param_groups
    each = 1 if s.stacked else len(params) // len(groups)
    hidden, width, wide = widths(s, params)
    count = params[0].shape[0] if s.stacked else each
    for i, group in enumerate(groups):
        shape = s.stored_shape(group, hidden, width, wide)
        wanted = (count, *shape) if s.stacked else shape
        for p in params[i * each : (i + 1) * each]:
            if p.shape != wanted:
                raise CodegenError(f"parameter {group!r} is {list(p.shape)}, expected {list(wanted)} for {s}")
    return count, hidden, width, wide
