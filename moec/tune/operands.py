"""What candidates are measured with: parameters of a layer of random numbers, on the default device.

Letters: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.codegen.tuning import Sizes
from moec.ir.spec import KernelSpec, stored_dtypes


def params_of(spec: KernelSpec, sizes: Sizes) -> list[Tensor]:
    """Each parameter in the order, shape and dtype in which an op takes them."""
    shapes = _shapes(spec, sizes)
    kinds = zip(shapes, stored_dtypes(spec.experts, len(shapes)), strict=True)
    return [torch.empty(shape, dtype=dtype).normal_(0, 0.02) for shape, dtype in kinds]


def _shapes(spec: KernelSpec, sizes: Sizes) -> list[tuple[int, ...]]:
    e = spec.experts
    each = [e.stored_shape(group, sizes.H, sizes.F, sizes.O) for group in e.param_groups]
    return [(sizes.E, *shape) for shape in each] if e.stacked else [shape for shape in each for _ in range(sizes.E)]
