"""How a kernel's own copy of the weights lies in memory: which numbers, and how many share a scale. Pure.

A matrix [N, K] is cut into panels of NR of its rows, each transposed to [K][NR]; int8 has NR scales before each group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.errors import CodegenError
from moec.ir.dtypes import STORED
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.target import Target


@dataclass(frozen=True)
class Storage:
    """element: f32, bf16, f16 or int8; pairs: two bf16 of K side by side; group: numbers that share a scale, 0: all."""

    element: str
    pairs: bool = False
    group: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return STORED[self.element].itemsize

    def column(self, depth: int) -> int:
        """Elements that one column of `depth` numbers takes in its panel, its scales among them."""
        if self.pairs:
            return depth + depth % 2
        return depth + (4 * -(-depth // (self.group or depth)) if self.element == "int8" and depth else 0)


def storage_of(weights: str, experts: ExpertsSpec, target: Target) -> Storage:
    """The storage that `packed`, `bf16`, `int8` or `int8:N` is for these experts; raises CodegenError."""
    if weights.startswith("int8"):
        _, _, group = weights.partition(":")
        return Storage("int8", group=int(group or 0))
    if weights not in ("packed", "bf16"):
        raise CodegenError(f"weights={weights!r}: no C++ kernel stores them so; expected packed, bf16, int8 or int8:N")
    element = "bf16" if weights == "bf16" and experts.dtype == "f32" else experts.dtype
    return Storage(element, pairs=element == experts.dtype == "bf16" and target.bf16_pairs)


def panel_spec(spec: KernelSpec) -> KernelSpec:
    """The spec of the kernel that reads panels: its two projections apart, whatever tensors they came from."""
    gate = "none" if spec.experts.gate == "none" else "separate"
    return replace(spec, experts=replace(spec.experts, gate=gate, layout_in="nk", layout_out="nk", stacked=True))
