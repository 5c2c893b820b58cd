"""Memory of parameters' gradients, kept from step to step for as long as its parameter lives.

A gradient is as large as its parameter and new in every step, so that the allocator asks the system for its pages each
time: clearing and mapping them takes a tenth of a step on a quiet machine and half of one where memory is virtual. A
block is handed out again when nobody but this module refers to it: no gradient, no view, no storage.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

_LEAST = 1 << 20  # bytes; below, the allocator keeps memory by itself
_MOST = 2  # blocks made for one parameter: a gradient that is kept, and one that is added to it
_users: Callable[[int], int] = torch._C._storage_Use_Count  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class _Block:
    """Memory of one gradient, and the parameter that it was made for."""

    storage: torch.UntypedStorage
    owner: weakref.ref[Tensor]

    @property
    def free(self) -> bool:
        """Whether nobody else refers to it, tensor or Python object; what another process was given never is again."""
        alone = _users(self.storage._cdata) == 1 and sys.getrefcount(self.storage) == 2
        return alone and not self.storage.is_shared()


class GradientMemory:
    """Blocks by size in bytes: as many as were in use at once, so layers whose gradients come and go share them."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[_Block]] = {}
        self._lock = threading.RLock()  # a parameter may be collected, and its block dropped, while a block is sought

    @property
    def bytes(self) -> int:
        """Held now, in use or not."""
        return sum(size * len(blocks) for size, blocks in self._blocks.items())

    def take(self, parameter: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of the parameter's shape and dtype."""
        size = parameter.numel() * parameter.element_size()
        if size < _LEAST:
            return torch.empty(parameter.shape, dtype=parameter.dtype)
        with self._lock:
            block = next((b for b in tuple(self._blocks.get(size, ())) if b.free), None)
            if block is None:
                block = self._made(parameter, size)
            made = torch.empty(0, dtype=parameter.dtype)
            return made.set_(block.storage, 0, parameter.shape)  # pyright: ignore[reportCallIssue,reportArgumentType]

    def release(self) -> None:
        """Let go of everything; what is in use stays with whoever uses it."""
        with self._lock:
            self._blocks.clear()

    def _made(self, parameter: Tensor, size: int) -> _Block:
        owner = weakref.ref(parameter, partial(self._drop, size))
        block = _Block(torch.empty(size, dtype=torch.uint8).untyped_storage(), owner)
        blocks = self._blocks.setdefault(size, [])
        mine = [b for b in blocks if b.owner() is parameter]
        for old in mine[: len(mine) - _MOST + 1]:  # a user who keeps the gradients of many steps keeps them alone
            blocks.remove(old)
        blocks.append(block)
        return block

    def _drop(self, size: int, owner: weakref.ref[Tensor]) -> None:
        with self._lock:
            left = [b for b in self._blocks.get(size, ()) if b.owner is not owner]
            if left:
                self._blocks[size] = left
            else:
                self._blocks.pop(size, None)


@lru_cache(maxsize=1)
def gradient_memory() -> GradientMemory:
    """The process's: threads share it, since autograd's threads are not the user's."""
    return GradientMemory()
