"""Operands: how the tensors of one call lie in memory, as far as kernels are specialised by it."""

from __future__ import annotations

from dataclasses import dataclass

from moec.codegen.plan import Sizes
from moec.ir.spec import ExpertsSpec, KernelSpec

Strides = tuple[int, ...]


@dataclass(frozen=True)
class Operands:
    """Element types and strides (in elements).

    x_strides       token, hidden
    router_strides  expert, hidden
    params          by parameter group: (expert, row, column) of a matrix whose rows are outputs and whose columns are
                    summed over, whichever of the two is contiguous; (expert, row) of a bias. The expert's stride is 0
                    where each expert has a tensor of its own
    weights_dtype   of the routing weights
    """

    x_dtype: str
    x_strides: tuple[int, int]
    params: tuple[tuple[str, Strides], ...]
    weights_dtype: str
    router_dtype: str = "f32"
    router_strides: tuple[int, int] = (0, 0)
    router_bias_dtype: str = "f32"
    selection_dtype: str = "f32"

    def strides(self, group: str) -> Strides:
        """The strides of one parameter group."""
        return dict(self.params)[group]


def contiguous(spec: KernelSpec, sizes: Sizes) -> Operands:
    """The operands of a call whose tensors are contiguous; x and the router's matrix are stored as the experts are."""
    e = spec.experts
    params = tuple((group, _contiguous(e, group, sizes)) for group in e.param_groups)
    weights = spec.router.weight_dtype if spec.router else "f32"
    dtype = e.dtype
    return Operands(dtype, (sizes.H, 1), params, weights, dtype, (sizes.H, 1), dtype, "f32")


def _contiguous(e: ExpertsSpec, group: str, sizes: Sizes) -> Strides:
    extent = e.shape(group, sizes.H, sizes.F, sizes.O)
    if len(extent) == 1:
        return (extent[0] if e.stacked else 0, 1)
    rows, columns = extent
    each = rows * columns if e.stacked else 0
    return (each, columns, 1) if e.layout(group) == "nk" else (each, 1, rows)
