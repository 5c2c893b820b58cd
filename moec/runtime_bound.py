"""Where an op's parameters lie, as Triton kernels take them: tensors, or tables of their addresses.

Letters: H hidden, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.binding import checked_sizes
from moec.codegen.triton_operands import Strides
from moec.errors import CodegenError
from moec.runtime_memory import Fence, capturing, outside_of_graphs
from moec.spec import KernelSpec


@dataclass(frozen=True)
class Bound:
    """Parameters by group as kernels take them (a tensor, or a table of addresses), their strides, E, H, F.

    keeps   whether it may be used again for parameters at the same addresses
    fence   after which the tables are written
    """

    tensors: Mapping[str, Tensor]
    strides: tuple[tuple[str, Strides], ...]
    E: int
    H: int
    F: int
    keeps: bool
    fence: Fence | None = field(default=None, compare=False)


def bind_to_keep(spec: KernelSpec, params: Sequence[Tensor]) -> Bound:
    """`bind`, for a binding that outlives the call where that is allowed.

    A stacked tensor is bound as it is: to keep that would keep the user's weights alive. What a CUDA graph records is
    written when the graph is replayed, so that calls outside of it find nothing there.
    """
    device = params[0].device
    if spec.experts.stacked or capturing(device):
        return bind(spec, params, keeps=False)
    return outside_of_graphs(lambda: bind(spec, params), device)


def bind(spec: KernelSpec, params: Sequence[Tensor], keeps: bool = True) -> Bound:
    """The parameter groups as kernels take them; raises CodegenError where shapes or devices contradict each other."""
    s = spec.experts
    count, hidden, width = checked_sizes(s, params)
    device = params[0].device
    if any(p.device != device for p in params):
        found = ", ".join(sorted({str(p.device) for p in params}))
        raise CodegenError(f"one layer's experts are on {found}; move them to one device")
    each = 1 if s.stacked else count
    tensors: dict[str, Tensor] = {}
    strides: list[tuple[str, Strides]] = []
    copied = False
    for i, group in enumerate(s.param_groups):
        tensor, own, copy = _group(spec, group, params[i * each : (i + 1) * each])
        tensors[group] = tensor
        strides.append((group, own))
        copied = copied or copy
    return Bound(tensors, tuple(strides), count, hidden, width, keeps and not copied, Fence(device) if keeps else None)


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
    device, addresses = tensors[0].device, [t.data_ptr() for t in tensors]
    if device.type == "cpu":
        table = torch.tensor(addresses, dtype=torch.int64)
    else:  # as arguments of a kernel: a copy from the host would wait for the device, and no CUDA graph records it
        table = tensors[0].new_zeros(len(addresses), dtype=torch.int64)
        torch._foreach_add_(list(table.unbind()), addresses)
    if keep:
        table._moec_alive = tensors  # type: ignore[attr-defined]
    return table
