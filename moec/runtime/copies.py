"""Copies of a layer's weights, kept for as long as the weights live and stay as they are.

Letters: E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moec.ir.spec import ExpertsSpec
from moec.report import PackRecord
from moec.runtime.binding import how_they_lie
from moec.runtime.calls import forget

B = TypeVar("B")
_MOST = 4096  # layers whose copies one kernel keeps
_State = tuple[object, ...]
_HEARD: ContextVar[tuple[list[PackRecord], ...]] = ContextVar("copies", default=())


@contextmanager
def copies_made() -> Generator[list[PackRecord]]:
    """The copies of weights that calls within it make, in order; in other threads none is heard of."""
    found: list[PackRecord] = []
    token = _HEARD.set((*_HEARD.get(), found))
    try:
        yield found
    finally:
        _HEARD.reset(token)


def tell(record: PackRecord) -> None:
    """Tell of a copy that was made."""
    for found in _HEARD.get():
        found.append(record)


@dataclass(frozen=True)
class _Copy(Generic[B]):
    """A layer's copy, and what it was made from: addresses, versions, strides of its parameters, and if they live."""

    state: _State
    sources: tuple[StorageWeakRef, ...]
    bound: B

    def is_of(self, params: Sequence[Tensor], state: _State) -> bool:
        """Whether it is still the copy of these parameters: the same memory, never freed since, and unchanged."""
        if self.state != state:
            return False
        return all(ref.cdata == p.untyped_storage()._cdata for ref, p in zip(self.sources, params, strict=True))


class Copies(Generic[B]):
    """The copies of the layers of one spec, by where their parameters lie; `make` copies a layer's parameters."""

    def __init__(self, s: ExpertsSpec, make: Callable[[Sequence[Tensor]], B]) -> None:
        self._groups, self._make = len(s.param_groups), make
        self.held: dict[int, _Copy[B]] = {}
        self._lock = threading.Lock()

    def of(self, params: Sequence[Tensor]) -> B:
        """The copy of these parameters, made anew where they changed."""
        where = params[0].data_ptr()
        state = (*((p.data_ptr(), p._version) for p in params), how_they_lie(params, self._groups))
        copy = self.held.get(where)
        if copy is not None and copy.is_of(params, state):
            return copy.bound
        with self._lock:
            held = self.held
            copy = held.get(where)
            if copy is None or not copy.is_of(params, state):
                copy = None
                self._let_go(where)
                sources = tuple(StorageWeakRef(p.untyped_storage()) for p in params)
                copy = held[where] = _Copy(state, sources, self._make(params))
        return copy.bound

    def _let_go(self, where: int) -> None:
        """Drop the old copy of what lies at `where`, before the new one is made, and those of layers that are gone."""
        held = self.held
        gone = [at for at, copy in held.items() if at == where or any(ref.expired() for ref in copy.sources)]
        if len(held) - len(gone) >= _MOST:
            gone = list(held)
        for at in gone:
            del held[at]
        if gone:
            forget()  # calls that read them
