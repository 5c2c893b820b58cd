"""A program's kernels, compiled for a device and launched by addresses: all else is looked up once, not at each launch.

Triton's own launch binds every argument by name, looks at each for what a kernel is specialised by, and finds the
compiled kernel under all of it: tens of microseconds, in which a GPU with few tokens waits. Between two calls of one
program only addresses differ, and of those only whether they are aligned matters to the compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from types import ModuleType
from typing import Any

import torch

from moec.codegen.triton_call import Launch, Program
from moec.ir.dtypes import TRITON

_ALIGNED = 16  # bytes that Triton specialises kernels by


@dataclass(frozen=True)
class _Pointer:
    """What Triton asks of a pointer when it compiles: an address, and on AMD's GPUs how many bytes lie behind it."""

    dtype: torch.dtype
    address: int
    reach: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return self.reach


@dataclass(frozen=True)
class _Step:
    """One launch: the compiled kernel and its grid, the names of its pointers, the arguments behind them."""

    kernel: Any
    grid: tuple[int, int, int]
    pointers: tuple[str, ...]
    rest: tuple[Any, ...]

    def start(self, addresses: Mapping[str, int], stream: int, watched: bool) -> None:
        """Launch it; `watched`: as Triton does where its hooks are to be called, which costs more than the launch."""
        args = (*[addresses[name] for name in self.pointers], *self.rest)
        kernel = self.kernel
        if watched:
            kernel[self.grid](*args, stream=stream)
        else:
            kernel.run(*self.grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *args)


class Compiled:
    """The kernels of a program on one device, by which of its tensors are not aligned.

    `reach`: bytes behind each pointer, by name. Raises what the compiler raises.
    """

    def __init__(self, module: ModuleType, program: Program, device: torch.device, reach: Mapping[str, int]) -> None:
        self._module, self._program, self._device, self._reach = module, program, device, dict(reach)
        self._variants: dict[frozenset[str], tuple[_Step, ...]] = {}
        self._steps(frozenset())

    def launch(self, addresses: Mapping[str, int]) -> None:
        """Launch all kernels, in order, on the device's current stream; `addresses` by name of tensor or buffer."""
        odd: frozenset[str] = frozenset()
        if reduce(or_, addresses.values()) % _ALIGNED:
            odd = frozenset(name for name, address in addresses.items() if address % _ALIGNED)
        steps = self._variants.get(odd) or self._steps(odd)
        driver, hooks = _triton()
        watched = _installed(hooks.launch_enter_hook) or _installed(hooks.launch_exit_hook)
        index = self._device.index
        with contextlib.nullcontext() if driver.get_current_device() == index else torch.cuda.device(self._device):
            stream = driver.get_current_stream(index)
            for step in steps:
                step.start(addresses, stream, watched)

    def _steps(self, odd: frozenset[str]) -> tuple[_Step, ...]:
        """The launches where the tensors named in `odd` begin anywhere, compiled at the first call of that kind."""
        with torch.cuda.device(self._device):
            made = tuple(self._step(launch, odd) for launch in self._program.launches)
        self._variants[odd] = made
        return made

    def _step(self, launch: Launch, odd: frozenset[str]) -> _Step:
        pointers = launch.pointers
        rest = tuple(a.value for a in launch.arguments[len(pointers) :])
        described = [
            _Pointer(TRITON[a.type[1:]], int(name in odd), self._reach[name])
            for name, a in zip(pointers, launch.arguments, strict=False)
        ]
        x, y, z = (*launch.grid, 1, 1)[:3]
        kernel = getattr(self._module, launch.kernel).warmup(*described, *rest, grid=(x, y, z), **launch.options())
        kernel._init_handles()  # where shared memory and registers are checked against the device's
        return _Step(kernel, (x, y, z), pointers, rest)


def _triton() -> tuple[Any, Any]:
    """Triton's driver for the machine's GPUs, and its knobs of launches."""
    from triton import knobs
    from triton.runtime import driver

    return driver.active, knobs.runtime


def _installed(hook: Any) -> bool:
    """Whether a hook does anything: an empty chain of them does not."""
    return hook is not None and bool(getattr(hook, "calls", True))
