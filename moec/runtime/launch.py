"""Programs of Triton launches made to run: kernels compiled before the first launch, buffers allocated, launched.

On a GPU compiled kernels are given addresses; Triton's interpreter (TRITON_INTERPRET=1) runs over tensors on the CPU.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from moec.codegen.triton_call import Argument, Program, places
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_launch import ALIGNED
from moec.errors import BuildError, CodegenError, MoecError
from moec.ir.dtypes import BUFFERS
from moec.runtime.compiled import Compiled


@dataclass(frozen=True)
class Built:
    """A program, the module that its kernels are in, and its kernels compiled; None: Triton interprets the module."""

    module: ModuleType
    program: Program
    compiled: Compiled | None = None

    @cached_property
    def places(self) -> tuple[tuple[int, ...], int]:
        """Where in one block each buffer begins, and what all of them take, in bytes."""
        return places(self.program, ALIGNED)


def built(
    module: ModuleType,
    make: Callable[[GpuConfig], Program],
    config: GpuConfig,
    tensors: Mapping[str, Tensor],
) -> Built:
    """The program of `config`, compiled for the device of the call's `tensors`, other calls' being like them.

    It has fewer stages where shared memory is too small. Raises BuildError where a kernel cannot be compiled, what
    `make` raises otherwise.
    """
    device = tensors["x"].device
    while True:
        made = make(config)
        if device.type == "cpu":
            return Built(module, made)
        reach = {name: _reach(tensor) for name, tensor in tensors.items()} | {b.name: b.bytes for b in made.buffers}
        try:
            return Built(module, made, Compiled(module, made, device, reach))
        except MoecError:
            raise
        except Exception as error:  # the compiler's own errors have no common base
            if not _too_large(error) or config.num_stages == 1:
                kind, text = type(error).__name__, " ".join(str(error).split())
                raise BuildError(f"Triton cannot compile the kernels for {device}: {kind}: {text[:300]}") from error
            config = replace(config, num_stages=config.num_stages - 1)


def _reach(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _too_large(error: Exception) -> bool:
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources) and error.name == "shared memory"


def run(built: Built | BuildError, tensors: Mapping[str, Tensor], reserved: int = 0) -> None:
    """Launch a program's kernels over `tensors` by name and buffers of its own. `x` says on which device.

    `reserved`: bytes for all buffers together, the same for each T of a declared range. The allocator then gives the
    same block to every call on a stream, and a CUDA graph that is captured at any T of it needs no more.

    Raises BuildError where the kernels could not be compiled, and CodegenError where a tensor is on another device:
    a kernel would read whatever is at its address there.
    """
    if isinstance(built, BuildError):
        raise built
    x = tensors["x"]
    device = x.device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise CodegenError(f"{name!r} is on {tensor.device}, x on {device}; move them to one device")
    if built.compiled is None:
        _interpret(built.module, built.program, {**tensors, **_views(built, x, reserved)})
        return
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    block = _placed(built, x, reserved, addresses)
    if built.program.scratch:  # in a context of its own, so that the allocator of the user's kernels stays what it is
        contextvars.copy_context().run(_launch_with_scratch, built.compiled, addresses, device)
    else:
        built.compiled.launch(addresses)
    del block  # not before: the allocator may give it away


def _placed(built: Built, x: Tensor, reserved: int, addresses: dict[str, int]) -> Tensor:
    """One block for all buffers, whose addresses join `addresses`."""
    begins, end = built.places
    block = x.new_empty(max(reserved, end), dtype=torch.uint8)
    base = block.data_ptr()
    for buffer, begin in zip(built.program.buffers, begins, strict=True):
        addresses[buffer.name] = base + begin
        if buffer.zeros:
            block[begin : begin + buffer.bytes].zero_()
    return block


def _views(built: Built, x: Tensor, reserved: int) -> dict[str, Tensor]:
    """The buffers as tensors in one such block."""
    begins, end = built.places
    block = x.new_empty(max(reserved, end), dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    for buffer, begin in zip(built.program.buffers, begins, strict=True):
        part = block[begin : begin + buffer.bytes].view(BUFFERS[buffer.dtype]).view(buffer.shape)
        found[buffer.name] = part.zero_() if buffer.zeros else part
    return found


def _interpret(module: ModuleType, made: Program, tensors: Mapping[str, Tensor]) -> None:
    for launch in made.launches:
        pointers = (a.type.startswith("*") for a in launch.arguments)
        args = [_argument(a, tensors) if p else a.value for a, p in zip(launch.arguments, pointers, strict=True)]
        getattr(module, launch.kernel)[launch.grid](*args, **launch.options())


def _argument(pointer: Argument, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor behind a pointer; fp8 that a target does not know is given as bytes."""
    tensor = tensors[pointer.binding or pointer.name]
    return tensor.view(torch.uint8) if pointer.type == "*u8" else tensor


def _launch_with_scratch(compiled: Compiled, addresses: Mapping[str, int], device: torch.device) -> None:
    """Memory for descriptors that kernels make: torch's own, so that it follows the stream and joins CUDA graphs."""
    import triton

    def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(scratch)
    compiled.launch(addresses)
