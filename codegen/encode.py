"""Expert weights → codes and scales: the copy that GPU kernels read, and how far it is from the original.

Letters: H hidden, F expert width, E experts; a matrix is [N, K], its rows being outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from moec.codegen import twin
from moec.codegen.codes import decoded, encoded
from moec.codegen.pack import Packed
from moec.ir.coding import Coding
from moec.ir.spec import KernelSpec


def coded_spec(spec: KernelSpec, weights: str) -> KernelSpec:
    """The spec of the kernel that reads codes: one tensor a parameter, rows being outputs. Raises ParseError."""
    codes = str(Coding.parse(weights))
    return replace(spec, experts=replace(spec.experts, codes=codes, layout_in="nk", layout_out="nk", stacked=True))


def encode(params: Sequence[Tensor], spec: KernelSpec, coded: KernelSpec) -> Packed:
    """The parameters of `spec` as those of `coded`, each [E, …]: codes, biases in their dtype, scales in fp32."""
    s, coding = spec.experts, coded.experts.coding
    assert coding is not None
    count = twin.num_experts(params, s)
    made: dict[str, Tensor] = {}
    wrong = total = 0.0
    for e in range(count):
        for group, tensor in twin.selected(params, s, e).items():
            value = tensor.detach()
            if group.startswith("bias_"):
                made.setdefault(group, value.new_empty(count, len(value)))[e] = value
                continue
            matrix = (value if s.layout(group) == "nk" else value.t()).float()
            codes, scales = encoded(matrix, coding)
            made.setdefault(group, codes.new_empty(count, *codes.shape))[e] = codes
            if coding.scaled:
                made.setdefault(f"scale_{group}", scales.new_empty(count, *scales.shape))[e] = scales
            wrong += float((decoded(codes, scales, coding) - matrix).square().sum())
            total += float(matrix.square().sum())
    return Packed(
        {group: made[group] for group in coded.experts.param_groups}, (wrong / total) ** 0.5 if total else 0.0
    )
