"""Programs of Triton launches made to run: buffers allocated, kernels compiled before the first launch, launched.

The same path serves a GPU and Triton's interpreter (TRITON_INTERPRET=1, tensors on the CPU).
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moec.bounds import up
from moec.codegen.triton_call import Argument, Buffer, Launch, Program
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_launch import ALIGNED
from moec.errors import BuildError, CodegenError, MoecError
from moec.spec import DTYPES

_BUFFER_DTYPES = {**DTYPES, "i32": torch.int32}
_POINTED = {
    "*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16, "*i32": torch.int32, "*i64": torch.int64,
    "*i8": torch.int8, "*u8": torch.uint8, "*fp8e4nv": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A program and the module that its kernels are in."""

    module: ModuleType
    program: Program


def built(module: ModuleType, make: Callable[[GpuConfig], Program], config: GpuConfig, device: torch.device) -> Built:
    """The program of `config`, its kernels compiled for `device`; with fewer stages where shared memory is too small.

    Raises BuildError where a kernel cannot be compiled, what `make` raises otherwise.
    """
    while True:
        made = make(config)
        try:
            if device.type != "cpu":
                with on_device(device):
                    for launch in made.launches:
                        _compile(module, launch)
            return Built(module, made)
        except MoecError:
            raise
        except Exception as error:  # the compiler's own errors have no common base
            if not _too_large(error) or config.num_stages == 1:
                kind, text = type(error).__name__, " ".join(str(error).split())
                raise BuildError(f"Triton cannot compile the kernels for {device}: {kind}: {text[:300]}") from error
            config = replace(config, num_stages=config.num_stages - 1)


def _too_large(error: Exception) -> bool:
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources) and error.name == "shared memory"


def _compile(module: ModuleType, launch: Launch) -> None:
    """Compile and load one kernel, as the launch will find it; nothing runs."""
    args = [_POINTED[a.type] if a.type.startswith("*") else a.value for a in launch.arguments]
    made = getattr(module, launch.kernel).warmup(*args, grid=launch.grid, **launch.options())
    made._init_handles()  # where shared memory and registers are checked against the device's


def run(built: Built | BuildError, tensors: dict[str, Tensor], reserved: int = 0) -> None:
    """Launch a program's kernels over `tensors` by name, which its buffers join. `x` says on which device.

    `reserved`: bytes for all buffers together, the same for each T of a declared range. The allocator then gives the
    same block to every call on a stream, and a CUDA graph that is captured at any T of it needs no more.

    Raises BuildError where the kernels could not be compiled, and CodegenError where a tensor is on another device:
    a kernel would read whatever is at its address there.
    """
    if isinstance(built, BuildError):
        raise built
    x, made = tensors["x"], built.program
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise CodegenError(f"{name!r} is on {tensor.device}, x on {x.device}; move them to one device")
    tensors |= arena(made.buffers, x, reserved) if reserved else apart(made.buffers, x)
    if made.scratch:  # in a context of its own, so that the allocator of the user's kernels stays what it is
        contextvars.copy_context().run(_launch, built.module, made, tensors)
    else:
        _launch(built.module, made, tensors)


def apart(buffers: Sequence[Buffer], x: Tensor) -> dict[str, Tensor]:
    """Each buffer by itself."""
    found: dict[str, Tensor] = {}
    for buffer in buffers:
        make = x.new_zeros if buffer.zeros else x.new_empty
        found[buffer.name] = make(buffer.shape, dtype=_BUFFER_DTYPES[buffer.dtype])
    return found


def arena(buffers: Sequence[Buffer], x: Tensor, size: int) -> dict[str, Tensor]:
    """All buffers in one block of `size` bytes, or of what they need where that is more."""
    ends = list(itertools.accumulate(up(buffer.bytes, ALIGNED) for buffer in buffers))
    block = x.new_empty(max(size, ends[-1]), dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    for buffer, begin in zip(buffers, (0, *ends), strict=False):
        part = block[begin : begin + buffer.bytes].view(_BUFFER_DTYPES[buffer.dtype]).view(buffer.shape)
        found[buffer.name] = part.zero_() if buffer.zeros else part
    return found


def _launch(module: ModuleType, made: Program, tensors: Mapping[str, Tensor]) -> None:
    x = tensors["x"]
    if made.scratch:
        _allocate_scratch_on(x.device)
    with on_device(x.device):
        for launch in made.launches:
            kernel = getattr(module, launch.kernel)
            pointers = (a.type.startswith("*") for a in launch.arguments)
            args = [_argument(a, tensors) if p else a.value for a, p in zip(launch.arguments, pointers, strict=True)]
            kernel[launch.grid](*args, num_warps=launch.num_warps, num_stages=launch.num_stages)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and stream: make them those of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _argument(pointer: Argument, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor behind a pointer; fp8 that a target does not know is given as bytes."""
    tensor = tensors[pointer.binding or pointer.name]
    return tensor.view(torch.uint8) if pointer.type == "*u8" else tensor


def _allocate_scratch_on(device: torch.device) -> None:
    """Memory for descriptors that kernels make: torch's own, so that it follows the stream and joins CUDA graphs."""
    import triton

    def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(scratch)
