"""A spec's Triton kernels as a Python object: launches worked out once a size, buffers allocated, kernels run in order.

The same path serves a GPU and Triton's interpreter (TRITON_INTERPRET=1, tensors on the CPU). Nothing waits for the
device and no allocation depends on data, so calls can be captured in a CUDA graph after a first call.
Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from moec.binding import Bindings, checked_sizes
from moec.codegen.plan import Sizes
from moec.codegen.triton_call import Argument, Program
from moec.codegen.triton_config import GpuConfig, check_target, default_config
from moec.codegen.triton_emit import load
from moec.codegen.triton_launch import program
from moec.codegen.triton_operands import Operands, Strides
from moec.codegen.triton_schedule import scheduled
from moec.errors import CodegenError
from moec.spec import DTYPE_NAMES, DTYPES, KernelSpec, stored_dtypes
from moec.target import GpuFigures, gpu_figures

_BUFFER_DTYPES = {**DTYPES, "i32": torch.int32}


@lru_cache(maxsize=1024)
def load_triton(spec: str, device: torch.device, combine: str = "ordered", schedule: str = "pointers") -> TritonKernel:
    """The Triton kernels of a spec for tensors on `device`; `combine` atomic: slots are added in any order.

    `schedule` says how the grouped products run (`moec.codegen.triton_schedule`).

    Raises CodegenError where the spec has no kernel, or where the device is the CPU and the interpreter is off.
    """
    from triton import knobs

    if device.type == "cpu" and not knobs.runtime.interpret:
        raise CodegenError(
            "kernels='triton' on CPU tensors runs in Triton's interpreter, which is off: "
            "set TRITON_INTERPRET=1 before Python starts, or move the model to a GPU, or use kernels='auto'"
        )
    if device.type not in ("cpu", "cuda"):
        raise CodegenError(f"kernels='triton' takes CUDA, ROCm or CPU tensors, got {device}; use kernels='eager'")
    figures = gpu_figures(device) if device.type == "cuda" else None
    return TritonKernel(KernelSpec.parse(spec), figures, combine, schedule)


@dataclass(frozen=True)
class Bound:
    """Parameters by group as kernels take them (a tensor, or a table of pointers), their strides, E, H, F."""

    tensors: Mapping[str, Tensor]
    strides: tuple[tuple[str, Strides], ...]
    E: int
    H: int
    F: int
    copied: bool


class TritonKernel:
    """The kernels of one spec on one device."""

    def __init__(
        self, spec: KernelSpec, figures: GpuFigures | None, combine: str = "ordered", schedule: str = "pointers"
    ) -> None:
        self.spec, self.figures, self.combine, self.schedule = spec, figures, combine, schedule
        self._module = load(spec)
        # A stacked tensor is bound as it is: to keep that would keep the user's weights alive.
        self._bindings = Bindings(lambda params: bind(spec, params), lambda b: not (b.copied or spec.experts.stacked))
        self._program = lru_cache(maxsize=1024)(self._make_program)

    def takes(self, x: Tensor, params: Sequence[Tensor]) -> bool:
        """Whether the dtypes are those of the spec; others (float64, say) are the twin's."""
        wanted = stored_dtypes(self.spec.experts, len(params))
        return x.dtype in DTYPE_NAMES and all(p.dtype == d for p, d in zip(params, wanted, strict=True))

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        params: Sequence[Tensor],
        capacity: int | None = None,
    ) -> Tensor:
        """x[T, H] of any strides, weights[T, k], experts[T, k] → y[T, H]; `capacity`: the most rows of one expert."""
        y = x.new_empty(x.shape, dtype=DTYPES[self.spec.y_dtype])
        if x.numel() == 0 or experts.shape[1] == 0:
            return y.zero_()
        if weights.dtype not in DTYPE_NAMES:
            weights = weights.float()
        bound = self.bound(params)
        given = {"weights": weights.contiguous(), "experts": experts.to(torch.int64).contiguous()}
        operands = self.operands(x, bound, weights.dtype)
        self._run(x, y, bound, given, operands, experts.shape[1], "experts", capacity)
        return y

    def moe(
        self, x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x[T, H] of any strides, router W[E, H] and its biases → y[T, H], logits[T, E], weights[T, k], experts."""
        r = self.spec.router
        if r is None:
            raise CodegenError(f"moec::moe needs a spec with a router, got {str(self.spec)!r}; call moec::experts")
        tokens, count = x.shape[0], router[0].shape[0]
        if not 0 < k <= count:
            raise CodegenError(f"k={k} experts a token of E={count}: expected 1 ≤ k ≤ E")
        y = x.new_empty(x.shape, dtype=DTYPES[self.spec.y_dtype])
        given = {
            "logits": x.new_empty((tokens, count), dtype=DTYPES[r.compute]),
            "weights": x.new_empty((tokens, k), dtype=DTYPES[r.weight_dtype]),
            "experts": x.new_empty((tokens, k), dtype=torch.int64),
        }
        results = (y, given["logits"], given["weights"], given["experts"])
        if x.numel() == 0:
            return results
        bound = self.bound(params)
        if count != bound.E:
            raise CodegenError(f"the router's matrix is {list(router[0].shape)}, but there are E={bound.E} experts")
        matrix, *rest = (t if t.dtype in DTYPE_NAMES else t.float() for t in router)
        given["router"] = matrix
        if r.bias:
            given["router_bias"] = rest.pop(0).contiguous()
        if r.selection_bias:
            given["selection"] = rest.pop(0).contiguous()
        operands = self.operands(x, bound, DTYPES[r.weight_dtype], given)
        self._run(x, y, bound, given, operands, k, "moe")
        return results

    def config_for(self, sizes: Sizes) -> GpuConfig:
        """The configuration of a call's kernels."""
        config = default_config(self.spec, sizes, self.figures)
        return replace(config, combine="atomic") if self.combine == "atomic" else config

    def operands(
        self, x: Tensor, bound: Bound, weights: torch.dtype, router: Mapping[str, Tensor] | None = None
    ) -> Operands:
        row, column = x.stride()
        base = (DTYPE_NAMES[x.dtype], (row, column), bound.strides, DTYPE_NAMES[weights])
        if router is None:
            return Operands(*base)
        matrix, empty = router["router"], x
        first, second = matrix.stride()
        bias, selection = router.get("router_bias", empty), router.get("selection", empty)
        names = (DTYPE_NAMES[matrix.dtype], (first, second), DTYPE_NAMES[bias.dtype], DTYPE_NAMES[selection.dtype])
        return Operands(*base, *names)

    def _make_program(self, sizes: Sizes, operands: Operands, entry: str, capacity: int | None) -> Program:
        config = scheduled(self.config_for(sizes), self.schedule, self.spec, sizes, operands, self.figures)
        return program(self.spec, sizes, check_target(config, self.figures), operands, entry, capacity)

    def _run(
        self,
        x: Tensor,
        y: Tensor,
        bound: Bound,
        given: Mapping[str, Tensor],
        operands: Operands,
        k: int,
        entry: str,
        capacity: int | None = None,
    ) -> None:
        if x.shape[1] != bound.H:
            raise CodegenError(f"x is {list(x.shape)}, but the experts' parameters want [T, {bound.H}]")
        sizes = Sizes(x.shape[0], bound.H, bound.F, bound.E, k)
        run(self._module, self._program(sizes, operands, entry, capacity), {"x": x, "y": y, **bound.tensors, **given})

    def bound(self, params: Sequence[Tensor]) -> Bound:
        """Where the parameters lie."""
        return self._bindings.of(params)


def run(module: ModuleType, made: Program, tensors: dict[str, Tensor]) -> None:
    """Launch a program's kernels over `tensors` by name, which its buffers join. `x` says on which device."""
    x = tensors["x"]
    for buffer in made.buffers:
        make = x.new_zeros if buffer.zeros else x.new_empty
        tensors[buffer.name] = make(buffer.shape, dtype=_BUFFER_DTYPES[buffer.dtype])
    if made.scratch:  # in a context of its own, so that the allocator of the user's kernels stays what it is
        contextvars.copy_context().run(_launch, module, made, tensors)
    else:
        _launch(module, made, tensors)


def _launch(module: ModuleType, made: Program, tensors: Mapping[str, Tensor]) -> None:
    x = tensors["x"]
    if made.scratch:
        _allocate_scratch_on(x.device)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        for launch in made.launches:
            kernel = getattr(module, launch.kernel)
            pointers = (a.type.startswith("*") for a in launch.arguments)
            args = [_argument(a, tensors) if p else a.value for a, p in zip(launch.arguments, pointers, strict=True)]
            kernel[launch.grid](*args, num_warps=launch.num_warps, num_stages=launch.num_stages)


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


def bind(spec: KernelSpec, params: Sequence[Tensor]) -> Bound:
    """The parameter groups as kernels take them; raises CodegenError where shapes contradict each other."""
    s = spec.experts
    count, hidden, width = checked_sizes(s, params)
    each = 1 if s.stacked else count
    tensors: dict[str, Tensor] = {}
    strides: list[tuple[str, Strides]] = []
    copied = False
    for i, group in enumerate(s.param_groups):
        tensor, own, copy = _group(spec, group, params[i * each : (i + 1) * each])
        tensors[group] = tensor
        strides.append((group, own))
        copied = copied or copy
    return Bound(tensors, tuple(strides), count, hidden, width, copied)


def _transposed(spec: KernelSpec, group: str) -> bool:
    """Whether a matrix is stored with its summed axis before its outputs."""
    return not group.startswith("bias_") and spec.experts.layout(group) == "kn"


def _group(spec: KernelSpec, group: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Strides, bool]:
    """(the tensor or the table of pointers, strides, whether it is a copy) of one parameter group."""
    first = tensors[0]
    if spec.experts.stacked:
        own = first.stride()
        return first, (own[0], *_ordered(own[1:], _transposed(spec, group))), False
    strides = (0, *_ordered(first.stride(), _transposed(spec, group)))
    if all(t.stride() == first.stride() and t.data_ptr() % 16 == 0 for t in tensors):
        return table_of(tensors), strides, False
    copies = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    strides = (0, *_ordered(copies[0].stride(), _transposed(spec, group)))
    return table_of(copies, keep=True), strides, True


def _ordered(strides: Sequence[int], transposed: bool) -> Strides:
    return tuple(reversed(strides)) if transposed else tuple(strides)


def table_of(tensors: Sequence[Tensor], keep: bool = False) -> Tensor:
    """The addresses of `tensors`, on their device; with `keep` they live as long as the table."""
    table = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=tensors[0].device)
    if keep:
        table._moec_alive = tensors  # type: ignore[attr-defined]
    return table
