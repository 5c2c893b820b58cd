"""A spec's Triton kernels as a Python object: a kind of call is worked out once, then its kernels run in order.

The same path serves a GPU and Triton's interpreter (TRITON_INTERPRET=1, tensors on the CPU). Nothing waits for the
device and no allocation depends on data, so calls can be captured in a CUDA graph after a first call.
Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from moec.codegen.plan import Sizes
from moec.codegen.triton_call import Program
from moec.codegen.triton_config import GpuConfig, check_target, default_config, sorted_config
from moec.codegen.triton_emit import load
from moec.codegen.triton_launch import buffer_formula, program
from moec.codegen.triton_operands import Operands
from moec.codegen.triton_schedule import scheduled
from moec.codegen.triton_views import undescribable
from moec.errors import BuildError, CodegenError, OptionError
from moec.ir.bounds import in_tokens
from moec.ir.dtypes import DTYPE_NAMES, DTYPES
from moec.ir.formulas import capacity_at
from moec.ir.spec import KernelSpec, stored_dtypes
from moec.ir.token_range import TokenRange
from moec.runtime.bound import Bound, Bounds
from moec.runtime.launch import Built, built, run
from moec.runtime.reserve import at_most, warn_beyond
from moec.runtime.tune_gpu_cache import stored_config
from moec.target import gpu_figures


@lru_cache(maxsize=1024)
def load_triton(spec: str, device: torch.device, combine: str = "ordered", schedule: str = "pointers") -> TritonKernel:
    """The Triton kernels of a spec for tensors on `device`; `combine` atomic: slots are added in any order.

    `schedule` says how the grouped products run (`moec.codegen.triton_schedule`).

    Raises CodegenError where the spec or the device has no kernels, OptionError on a CPU without the interpreter.
    """
    knobs = triton().knobs
    if device.type == "cpu" and not knobs.runtime.interpret:
        raise OptionError(
            "option kernels='triton': on CPU tensors it runs in Triton's interpreter, which is off: "
            "set TRITON_INTERPRET=1 before Python starts, or move the model to a GPU, or use kernels='auto'"
        )
    if device.type not in ("cpu", "cuda"):
        raise CodegenError(f"kernels='triton' takes CUDA, ROCm or CPU tensors, got {device}; use kernels='eager'")
    return TritonKernel(KernelSpec.parse(spec), device, combine, schedule)


def triton() -> ModuleType:
    """Triton; raises CodegenError where it is not installed."""
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise CodegenError(f"Triton cannot be imported ({error}): pip install triton") from error


def allows_tf32(device: torch.device) -> bool:
    """Whether the user lets products of fp32 numbers be rounded to tf32, as torch does on NVIDIA's GPUs."""
    return device.type == "cuda" and not torch.version.hip and torch.backends.cuda.matmul.fp32_precision == "tf32"


_MOST = 1024  # kinds of calls that one kernel remembers


class _Call(NamedTuple):
    """Which entry runs with k experts a token; its capacity as a formula of T, the range of T; empty: none.

    save: what φ reads is kept for a backward pass.
    """

    entry: str
    k: int
    capacity: str
    tokens: str
    save: bool = False


class _Ready(NamedTuple):
    """What runs for calls of one kind, and the bytes that they reserve."""

    built: Built | BuildError
    reserved: int


class TritonKernel:
    """The kernels of one spec on one device."""

    def __init__(
        self, spec: KernelSpec, device: torch.device, combine: str = "ordered", schedule: str = "pointers"
    ) -> None:
        self.spec, self.device, self.combine, self.schedule = spec, device, combine, schedule
        self.figures = gpu_figures(device) if device.type == "cuda" else None
        self._bounds = Bounds(spec)
        self._dtypes = lru_cache(maxsize=16)(lambda count: stored_dtypes(spec.experts, count))
        self._configs = lru_cache(maxsize=1024)(self._config)
        self._most_bytes = lru_cache(maxsize=1024)(self._make_reserved)
        self._ready: dict[tuple[object, ...], _Ready] = {}
        self._fixed: GpuConfig | None = None
        load(spec)  # what cannot be generated is known before the first call

    def takes(self, x: Tensor, params: Sequence[Tensor]) -> bool:
        """Whether the dtypes are those of the spec; others (float64, say) are the twin's."""
        return x.dtype in DTYPE_NAMES and [p.dtype for p in params] == self._dtypes(len(params))

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        params: Sequence[Tensor],
        capacity: str = "",
        tokens: str = "",
        saved: Tensor | None = None,
    ) -> Tensor:
        """x[T, H] of any strides, weights[T, k], experts[T, k] → y[T, O].

        `capacity`: the most rows of one expert, as a formula of T; `tokens`: the range of T that buffers are taken for.
        `saved`[T·k, F or 2F] is given what φ reads of each pair: a, then b; rows without an expert stay as they are.
        """
        x, bound = rows_of(x), self.bound(params)
        y = self._empty(x, bound)
        if x.numel() == 0 or experts.shape[1] == 0:
            return y.zero_()
        if weights.dtype not in DTYPE_NAMES:
            weights = weights.float()
        given = {"weights": weights.contiguous(), "experts": experts.to(torch.int64).contiguous()}
        call = _Call("experts", experts.shape[1], capacity, tokens, saved is not None)
        self._run(x, y, bound, given if saved is None else {**given, "saved": saved}, call)
        return y

    def moe(
        self, x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], k: int, tokens: str = ""
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x[T, H] of any strides, router W[E, H] and its biases → y[T, O], logits[T, E], weights[T, k], experts.

        `tokens`: the range of T that buffers are taken for.
        """
        r = self.spec.router
        if r is None:
            raise CodegenError(f"moec::moe needs a spec with a router, got {str(self.spec)!r}; call moec::experts")
        rows, count = x.shape[0], router[0].shape[0]
        if not 0 < k <= count:
            raise CodegenError(f"k={k} experts a token of E={count}: expected 1 ≤ k ≤ E")
        x, bound = rows_of(x), self.bound(params)
        y = self._empty(x, bound)
        given = {
            "logits": x.new_empty((rows, count), dtype=DTYPES[r.compute]),
            "weights": x.new_empty((rows, k), dtype=DTYPES[r.weight_dtype]),
            "experts": x.new_empty((rows, k), dtype=torch.int64),
        }
        results = (y, given["logits"], given["weights"], given["experts"])
        if x.numel() == 0:
            return results
        if count != bound.layout.E:
            wanted = f"E={bound.layout.E} experts"
            raise CodegenError(f"the router's matrix is {list(router[0].shape)}, but there are {wanted}")
        matrix, *rest = (t if t.dtype in DTYPE_NAMES else t.float() for t in router)
        given["router"] = matrix
        if r.bias:
            given["router_bias"] = rest.pop(0).contiguous()
        if r.selection_bias:
            given["selection"] = rest.pop(0).contiguous()
        self._run(x, y, bound, given, _Call("moe", k, "", tokens))
        return results

    def _empty(self, x: Tensor, bound: Bound) -> Tensor:
        """Room for y."""
        return x.new_empty((x.shape[0], bound.layout.O), dtype=DTYPES[self.spec.y_dtype])

    def config_for(self, sizes: Sizes) -> GpuConfig:
        """The configuration of a call's kernels."""
        if self._fixed is not None:
            return self._fixed
        config = self._configs(sizes, self._tf32())
        return replace(config, combine="atomic") if self.combine == "atomic" else config

    def with_config(self, config: GpuConfig) -> TritonKernel:
        """This kernel with one configuration for all sizes; what is compiled and bound they share."""
        made = copy(self)
        made._fixed, made._ready = config, {}
        return made

    def _tf32(self) -> bool:
        """Whether products may be rounded to tf32: only those of fp32 numbers can be."""
        return self.spec.experts.dtype == "f32" and allows_tf32(self.device)

    def _config(self, sizes: Sizes, tf32: bool) -> GpuConfig:
        """What was measured, where that can serve; else the default."""
        default = default_config(self.spec, sizes, self.figures, tf32)
        found = None if tf32 else stored_config(self.spec, sizes, self.figures)
        plain = self.schedule == "pointers" and self.combine == "ordered"  # nothing else is asked for by name
        return found if found is not None and plain and found.variant == default.variant else default

    def operands(self, x: Tensor, bound: Bound, given: Mapping[str, Tensor]) -> Operands:
        """How the tensors of a call lie; `given` by name: routing weights, and the router's where it has one."""
        row, column = x.stride()
        base = (DTYPE_NAMES[x.dtype], (row, column), bound.layout.strides, DTYPE_NAMES[given["weights"].dtype])
        if "router" not in given:
            return Operands(*base)
        matrix, empty = given["router"], x
        first, second = matrix.stride()
        bias, selection = given.get("router_bias", empty), given.get("selection", empty)
        names = (DTYPE_NAMES[matrix.dtype], (first, second), DTYPE_NAMES[bias.dtype], DTYPE_NAMES[selection.dtype])
        return Operands(*base, *names)

    def _run(self, x: Tensor, y: Tensor, bound: Bound, given: Mapping[str, Tensor], call: _Call) -> None:
        lie = [(t.dtype, t.stride()) for t in given.values()]
        kind = (call, x.dtype, x.shape, x.stride(), bound.layout, self._tf32(), *lie)
        tensors = {"x": x, "y": y, **bound.tensors, **given}
        ready = self._ready.get(kind)
        if ready is None:
            if len(self._ready) >= _MOST:
                self._ready.clear()
            ready = self._ready[kind] = self._make_ready(tensors, bound, given, call)
        run(ready.built, tensors, ready.reserved)

    def _make_ready(
        self, tensors: Mapping[str, Tensor], bound: Bound, given: Mapping[str, Tensor], call: _Call
    ) -> _Ready:
        x, (_, count, hidden, width, wide) = tensors["x"], bound.layout
        if x.shape[1] != hidden:
            raise CodegenError(f"x is {list(x.shape)}, but the experts' parameters want [T, {hidden}]")
        sizes = Sizes(x.shape[0], hidden, width, count, call.k, wide)
        operands = self.operands(x, bound, given)
        capacity = capacity_at(call.capacity, sizes.T) if call.capacity else None
        usable = self._usable(sizes, operands)
        config = scheduled(sorted_config(usable) if call.save else usable, self.schedule, self.figures)
        checked = check_target(config, self.figures)
        reserved = self._reserved(sizes, operands, call)

        def make(config: GpuConfig) -> Program:
            return program(self.spec, sizes, config, operands, call.entry, capacity, call.save)

        try:
            return _Ready(built(load(self.spec, tf32=checked.tf32), make, checked, tensors), reserved)
        except BuildError as error:
            return _Ready(error, reserved)  # kept as well: to compile again in every call would cost seconds each

    def _usable(self, sizes: Sizes, operands: Operands) -> GpuConfig:
        """The configuration, without descriptors where it was measured with weights that lie otherwise."""
        config = self.config_for(sizes)
        described = config.weights == "descriptors" and self._fixed is None
        if described and undescribable(self.spec, sizes, config, operands):
            return replace(config, weights="pointers", specialized=False)
        return config

    def _make_reserved(self, sizes: Sizes, operands: Operands, call: _Call) -> int:
        """Bytes of the buffers of every call with up to `sizes.T` tokens."""
        limit = in_tokens(call.capacity) if call.capacity else None

        def config(at: Sizes) -> GpuConfig:
            return scheduled(self._usable(at, operands), self.schedule, self.figures)

        return at_most(buffer_formula(self.spec, sizes, call.entry == "moe", config, limit), sizes.T)

    def _reserved(self, sizes: Sizes, operands: Operands, call: _Call) -> int:
        """What a call takes at once for its buffers; 0: each of them by itself, as large as it needs it."""
        if not call.tokens:
            return 0
        high = TokenRange.parse(call.tokens).high
        if high < sizes.T:
            warn_beyond(call.tokens)
            return 0
        return self._most_bytes(replace(sizes, T=high), operands, call)

    def bound(self, params: Sequence[Tensor]) -> Bound:
        """Where the parameters lie, as the current stream may read it."""
        found = self._bounds.of(params)
        if found.fence is not None:
            found.fence.wait(self.device)
        return found


def rows_of(x: Tensor) -> Tensor:
    """x[T, H] with contiguous rows: other strides would be constants of a kernel that depend on T."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
