"""Expert weights → panels, in plain torch: the copy that packed kernels read, and how far it is from the original.

Letters: H hidden, F expert width, E experts; a matrix is [N, K], its panels are [ceil(N / NR), K, NR].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.codegen import twin
from moec.codegen.storage import Storage
from moec.ir.dtypes import DTYPES
from moec.ir.spec import KernelSpec


@dataclass(frozen=True)
class Packed:
    """A layer's matrices and biases as packed kernels take them, each [E, …]; `error` is ‖copy - w‖ / ‖w‖ over all."""

    tensors: dict[str, Tensor]
    error: float

    @property
    def bytes(self) -> int:
        """Bytes of the copy."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def pack(params: Sequence[Tensor], spec: KernelSpec, storage: Storage, width: int) -> Packed:
    """The parameters of `spec` in panels `width` wide: matrices a, b (if gated) and out, and biases in their dtype."""
    count = twin.num_experts(params, spec.experts)
    made: dict[str, Tensor] = {}
    wrong = total = 0.0
    for e in range(count):
        views = twin.expert(params, spec.experts, e)
        for name, matrix in (("a", views.w_a), ("b", views.w_b), ("out", views.w_out)):
            if matrix is None:
                continue
            if name not in made:
                made[name] = torch.zeros(count, panel_bytes(matrix.shape, storage, width), dtype=torch.uint8)
            errors = _pack_matrix(matrix.detach(), storage, width, made[name][e])
            wrong, total = wrong + errors[0], total + errors[1]
        for name, bias in (("bias_a", views.b_a), ("bias_b", views.b_b), ("bias_out", views.b_out)):
            if bias is not None:
                made.setdefault(name, bias.new_empty(count, len(bias)))[e] = bias.detach()
    return Packed(made, (wrong / total) ** 0.5 if total > 0 else 0.0)


def panel_bytes(shape: Sequence[int], storage: Storage, width: int) -> int:
    """Bytes of a matrix [N, K] in panels."""
    return -(-shape[0] // width) * width * storage.column(shape[1]) * storage.itemsize


def _pack_matrix(matrix: Tensor, storage: Storage, width: int, to: Tensor) -> tuple[float, float]:
    """Write the panels of matrix[N, K] into `to`; ‖copy - w‖² and ‖w‖² where the copy rounds, else zeros."""
    rows, depth = matrix.shape
    panels = -(-rows // width)
    if panels * width != rows:
        matrix = torch.cat([matrix, matrix.new_zeros(panels * width - rows, depth)])
    if storage.element == "int8":
        return _pack_int8(matrix.float().view(panels, width, depth), storage.group or depth, to.view(panels, -1))
    wide = storage.column(depth)
    if wide != depth:
        matrix = torch.cat([matrix, matrix.new_zeros(len(matrix), wide - depth)], 1)
    dtype, pair = DTYPES[storage.element], 2 if storage.pairs else 1
    out = to.view(dtype).view(panels, wide // pair, width, pair)
    out.copy_(matrix.view(panels, width, wide // pair, pair).transpose(1, 2))
    if dtype == matrix.dtype:
        return 0.0, 0.0
    return _distance(matrix.to(dtype).float(), matrix.float())


def _pack_int8(matrix: Tensor, group: int, to: Tensor) -> tuple[float, float]:
    """matrix[P, NR, K] → to[P, …]: for each `group` numbers of K, NR scales in fp32 and then [numbers][NR] int8.

    Symmetric: the largest magnitude of a group is 127 of its scales, zero stays zero.
    """
    panels, width, depth = matrix.shape
    wrong = total = 0.0
    at = 0
    for k in range(0, depth, group):
        part = matrix[:, :, k : k + group]
        scale = part.abs().amax(-1, keepdim=True) / 127
        codes = (part / scale.where(scale > 0, 1.0)).round_().clamp_(-127, 127)
        numbers = part.shape[-1]
        to[:, at : at + 4 * width] = scale.squeeze(-1).contiguous().view(torch.uint8)
        at += 4 * width
        block = codes.transpose(1, 2).to(torch.int8).contiguous()
        to[:, at : at + numbers * width] = block.view(panels, -1).view(torch.uint8)
        at += numbers * width
        errors = _distance(codes * scale, part)
        wrong, total = wrong + errors[0], total + errors[1]
    return wrong, total


def _distance(copy: Tensor, original: Tensor) -> tuple[float, float]:
    return float((copy - original).square().sum()), float(original.square().sum())
