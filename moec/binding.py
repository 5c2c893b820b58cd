"""An op's parameters as kernels see them: sizes checked, and where they lie worked out once for those that stay.

Letters: H hidden, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from moec.errors import CodegenError
from moec.spec import ExpertsSpec, out_sizes

B = TypeVar("B")

_MOST = 4096  # layers that one kernel remembers


class Bindings(Generic[B]):
    """What `bind` makes of parameters, kept while `keeps` allows it, by where the tensors lie in memory."""

    def __init__(self, bind: Callable[[Sequence[Tensor]], B], keeps: Callable[[B], bool]) -> None:
        self._bind, self._keeps = bind, keeps
        self._known: dict[tuple[object, ...], B] = {}

    def of(self, params: Sequence[Tensor]) -> B:
        """The binding of these parameters; raises what `bind` raises."""
        first, last = params[0], params[-1]
        key = (tuple(map(Tensor.data_ptr, params)), first.shape, first.stride(), last.shape, last.stride())
        bound = self._known.get(key)
        if bound is None:
            bound = self._bind(params)
            if self._keeps(bound):
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[key] = bound
        return bound


def checked_sizes(s: ExpertsSpec, params: Sequence[Tensor]) -> tuple[int, int, int]:
    """(E, H, F) of the parameters.

    Raises CodegenError where one has not the shape that the others imply: a kernel would read past it.
    """
    groups = s.param_groups
    each = 1 if s.stacked else len(params) // len(groups)
    hidden, width = out_sizes(s, params)
    count = params[0].shape[0] if s.stacked else each
    for i, group in enumerate(groups):
        shape = s.stored_shape(group, hidden, width)
        wanted = (count, *shape) if s.stacked else shape
        for p in params[i * each : (i + 1) * each]:
            if p.shape != wanted:
                raise CodegenError(f"parameter {group!r} is {list(p.shape)}, expected {list(wanted)} for {s}")
    return count, hidden, width
