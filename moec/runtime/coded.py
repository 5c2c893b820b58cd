"""Triton kernels that read a copy of the weights in codes: made at first use, and again when the weights changed.

Letters: T tokens, E experts, k experts a token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moec.codegen.cost_model import rows_past_codes
from moec.codegen.encode import coded_spec, encode
from moec.errors import CodegenError
from moec.gpu.target import gpu_targets
from moec.ir.dtypes import DTYPES
from moec.ir.spec import stored_dtypes
from moec.report import PackRecord
from moec.runtime.binding import checked_sizes
from moec.runtime.bound import Bound, bind
from moec.runtime.copies import Copies, tell
from moec.runtime.memory import capturing, outside_of_graphs
from moec.runtime.packed import warn_once
from moec.runtime.triton import TritonKernel


class CodedKernel(TritonKernel):
    """A kernel over its own copy of the experts' matrices. It takes the user's parameters, like any kernel.

    Where an expert has so many rows that converting costs more than reading saves (`rows_past_codes`), the parameters
    themselves are read: they are there. A configuration given by hand always reads the copy.
    """

    def __init__(self, plain: TritonKernel, weights: str) -> None:
        super().__init__(coded_spec(plain.spec, weights), plain.device, plain.combine, plain.schedule)
        self.plain, self.user, self.weights = plain, plain.spec, weights
        self._copies = Copies(plain.spec.experts, self._copied)
        dtype = self.user.experts.dtype
        target = next((t for t in gpu_targets() if self.figures and t.name == self.figures.name), None)
        coding = self.spec.experts.coding
        short = dtype != "f32"  # beside fp32's products, which no tensor core does, converting is nothing
        self._many_rows = rows_past_codes(target, dtype, coding.element) if target and short and coding else math.inf

    def takes(self, x: Tensor, params: Sequence[Tensor]) -> bool:
        """Whether the dtypes are those of the user's spec."""
        return x.dtype in DTYPES.values() and [p.dtype for p in params] == stored_dtypes(self.user.experts, len(params))

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
        """As `TritonKernel.experts`."""
        run = self.plain.experts if self._reads_stored(experts.numel(), params) else super().experts
        return run(x, weights, experts, params, capacity, tokens, saved)

    def moe(
        self, x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], k: int, tokens: str = ""
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `TritonKernel.moe`."""
        run = self.plain.moe if self._reads_stored(x.shape[0] * k, params) else super().moe
        return run(x, router, params, k, tokens)

    def _reads_stored(self, pairs: int, params: Sequence[Tensor]) -> bool:
        count = params[0].shape[0] if self.user.experts.stacked else len(params) // len(self.user.experts.param_groups)
        if self._fixed is not None or pairs < self._many_rows * count:
            return False
        self.bound(params)  # made at the first call whatever its T is: a CUDA graph may record the next one
        return True

    def bound(self, params: Sequence[Tensor]) -> Bound:
        """Where the copy of the parameters lies."""
        return self._copies.of(params)

    def _copied(self, params: Sequence[Tensor]) -> Bound:
        device = params[0].device
        if capturing(device):
            raise CodegenError(
                f"weights={self.weights!r}: the copy of the weights is made at the first call, which no CUDA graph can"
                " record; call the model once before it is recorded"
            )
        bound, record = outside_of_graphs(lambda: self._encoded(params), device)
        tell(record)
        return bound

    def _encoded(self, params: Sequence[Tensor]) -> tuple[Bound, PackRecord]:
        start = time.perf_counter()
        count, *_ = checked_sizes(self.user.experts, params)
        copy = encode(params, self.user, self.spec)
        if copy.tensors["out"].is_cuda:
            torch.cuda.synchronize(copy.tensors["out"].device)
        seconds = time.perf_counter() - start
        stored = sum(p.numel() * p.element_size() for p in params)
        record = PackRecord(self.weights, count, stored, copy.bytes, seconds, copy.error)
        return bind(self.spec, list(copy.tensors.values())), record


def coded_kernel(plain: TritonKernel, weights: str, params: Sequence[Tensor]) -> TritonKernel:
    """The kernel that reads these parameters as `weights` says; `plain`, with one warning, where there is none."""
    if weights == "bf16" and plain.spec.experts.dtype != "f32":
        return plain  # in two bytes already
    if any(p.is_inference() for p in params):
        warn_once("parameters that were made under inference_mode carry no version")
        return plain
    try:
        return _coded(plain, weights)
    except CodegenError as error:
        warn_once(str(error))
        return plain


@lru_cache(maxsize=256)
def _coded(plain: TritonKernel, weights: str) -> CodedKernel:
    """Raises CodegenError where no kernel reads such a copy."""
    if weights == "packed":
        raise CodegenError(
            "Triton kernels have no order of their own for weights; leave out freeze and weights='packed'"
        )
    columns = coded_spec(plain.spec, weights).experts.coding
    if columns and columns.columns % 16:
        raise CodegenError(f"weights={weights!r}: Triton kernels take a scale for a multiple of 16 numbers, or for all")
    return CodedKernel(plain, weights)
