"""Kernels that read their own copy of frozen weights: packed at first use, and again when they changed.

Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moec.codegen.cpp import emit
from moec.codegen.pack import Packed, pack
from moec.codegen.plan import Plan, Rows, make_plan
from moec.codegen.storage import Storage, panel_spec, storage_of
from moec.codegen.tuning import Sizes, Tuning
from moec.errors import BuildError, CodegenError
from moec.ir.dtypes import DTYPES
from moec.ir.spec import KernelSpec
from moec.report import PackRecord
from moec.runtime.calls import kernel_library
from moec.runtime.copies import Copies, tell
from moec.runtime.cpu import ABSENT, Bound, Kernel, bind, router_storage
from moec.runtime.nodes import words_of
from moec.runtime.tune_cache import Key
from moec.target import Target


class PackedKernel(Kernel):
    """A kernel over its own copy of the experts' matrices. It takes the user's parameters, like any kernel."""

    def __init__(
        self,
        user: KernelSpec,
        weights: str,
        target: Target,
        router_dtype: torch.dtype,
        library: ctypes.CDLL,
        tuning: Tuning | None = None,
        copies: Copies[Bound] | None = None,
    ) -> None:
        super().__init__(panel_spec(user), target, router_dtype, library, tuning)
        self.user, self.weights = user, weights
        self._storage: Storage = storage_of(weights, user.experts, target)
        self._copies = copies or Copies(user.experts, self._copied)

    def tuned(self, tuning: Tuning | None) -> PackedKernel:
        """The same kernel over the same copies, all of whose plans have these numbers (None: the default's)."""
        return PackedKernel(
            self.user, self.weights, self.target, self._router_dtype, self.library, tuning, self._copies
        )

    def key(self, sizes: Sizes, threads: int) -> Key:
        """What a measurement of this kernel at these sizes is kept under."""
        return replace(super().key(sizes, threads), weights=self.weights)

    def storage(self) -> Storage | None:
        """How the copies lie."""
        return self._storage

    def _plan_of(self, sizes: Sizes, x: Rows, threads: int) -> Plan:
        tuning = self.tuning or self._stored(sizes, threads)
        return make_plan(self.spec, sizes, x, self.target, threads, tuning, self._storage)

    def _bound(self, params: Sequence[Tensor]) -> Bound:
        return self._copies.of(params)

    def _copied(self, params: Sequence[Tensor]) -> Bound:
        start = time.perf_counter()
        original = bind(self.user, params)  # checks the shapes
        packed = pack(params, self.user, self._storage, self.target.lanes * self.target.tile_vectors)
        seconds = time.perf_counter() - start
        stored = sum(p.numel() * p.element_size() for p in params)
        tell(PackRecord(self.weights, original.E, stored, packed.bytes, seconds, packed.error))
        words = _words(packed, self._storage, original.H, original.F)
        # Memory whose freeing is remarked is not given to another tensor: what is known of it here stays true.
        alive: list[object] = [packed, *(StorageWeakRef(p.untyped_storage()) for p in params)]
        nodes = words_of([[t] for name, t in packed.tensors.items() if name in ("a", "b", "out")], alive)
        return Bound(words, original.E, original.H, original.F, original.O, tuple(alive), False, nodes=nodes)


def _words(packed: Packed, storage: Storage, hidden: int, width: int) -> tuple[int, ...]:
    """Where the copies lie, as words of `Args`."""

    def matrix(name: str, depth: int) -> tuple[int, ...]:
        tensor = packed.tensors.get(name)
        return (tensor.data_ptr(), tensor.stride(0), 0, 0, storage.column(depth)) if tensor is not None else ABSENT

    def bias(name: str) -> tuple[int, ...]:
        tensor = packed.tensors.get(name)
        return (tensor.data_ptr(), tensor.stride(0) * tensor.element_size(), 0, 0, 0) if tensor is not None else ABSENT

    matrices = (matrix("a", hidden), matrix("b", hidden), matrix("out", width))
    return tuple(word for part in (*matrices, *map(bias, ("bias_a", "bias_b", "bias_out"))) for word in part)


def load_packed(
    spec: str, weights: str, router_dtype: torch.dtype | None, target: Target | None = None
) -> PackedKernel:
    """The kernel that reads its own copy of the weights, stored as `weights` says.

    Raises CodegenError where there is no such kernel, BuildError where it cannot be built.
    """
    return _load(spec, weights, router_dtype, target or Target.host())


@lru_cache(maxsize=256)
def _load(text: str, weights: str, router_dtype: torch.dtype | None, target: Target) -> PackedKernel:
    spec = KernelSpec.parse(text)
    stored = "f32" if spec.router is None else router_storage(router_dtype or torch.float32, spec)
    storage = storage_of(weights, spec.experts, target)
    library = kernel_library(emit(panel_spec(spec), target, stored, storage), target)
    return PackedKernel(spec, weights, target, DTYPES[stored], library)


def packed_kernel(
    spec: str, weights: str, router_dtype: torch.dtype | None, params: Sequence[Tensor]
) -> PackedKernel | None:
    """The packed kernel for these parameters; None, with one warning, where there is none."""
    if any(p.is_inference() for p in params):
        warn_once("parameters that were made under inference_mode carry no version")
        return None
    try:
        return load_packed(spec, weights, router_dtype)
    except (BuildError, CodegenError) as error:
        warn_once(str(error))
        return None


@lru_cache(maxsize=16)
def warn_once(reason: str) -> None:
    """Say once why weights are read as they are stored."""
    warnings.warn(f"moec: weights are read as stored, not from a packed copy: {reason}", RuntimeWarning, stacklevel=2)
