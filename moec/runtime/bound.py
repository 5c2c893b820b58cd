"""Where an op's parameters lie, as Triton kernels take them: tensors, or tables of their addresses.

Letters: H hidden, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moec.codegen.triton_operands import Strides
from moec.errors import CodegenError
from moec.ir.spec import KernelSpec
from moec.runtime.binding import Bindings, checked_sizes
from moec.runtime.memory import Fence, capturing, outside_of_graphs

_MOST = 1024  # layouts of stacked parameters that one kernel remembers


class Layout(NamedTuple):
    """Strides of the parameters by group as kernels take them, and E, H, F, O."""

    strides: tuple[tuple[str, Strides], ...]
    E: int
    H: int
    F: int
    O: int


class Bound(NamedTuple):
    """Parameters by group as kernels take them (a tensor, or a table of addresses), and how they lie.

    keeps   whether it may be used again for parameters at the same addresses
    fence   after which the tables are written
    """

    tensors: Mapping[str, Tensor]
    layout: Layout
    keeps: bool = False
    fence: Fence | None = None


class Bounds:
    """What the parameters of one spec's calls are bound to.

    Tables of addresses are kept. A stacked tensor is bound as it is, since to keep that would keep the user's weights
    alive: of those only the layout is.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self._spec, self._stacked, self._groups = spec, spec.experts.stacked, spec.experts.param_groups
        self._tables = Bindings(spec.experts, lambda params: _bind_to_keep(spec, params), lambda bound: bound.keeps)
        self._layouts: dict[tuple[object, ...], Layout] = {}

    def of(self, params: Sequence[Tensor]) -> Bound:
        """The parameters as kernels take them; raises as `bind` does."""
        if not self._stacked:
            return self._tables.of(params)
        key = tuple([(p.shape, p.stride()) for p in params])
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _MOST:
                self._layouts.clear()
            layout = self._layouts[key] = bind(self._spec, params, keeps=False).layout
        return Bound(dict(zip(self._groups, params, strict=True)), layout)


def _bind_to_keep(spec: KernelSpec, params: Sequence[Tensor]) -> Bound:
    """`bind` to tables that outlive the call where that is allowed.

    What a CUDA graph records is written when the graph is replayed, so that calls outside of it find nothing there.
    """
    device = params[0].device
    if capturing(device):
        return bind(spec, params, keeps=False)
    return outside_of_graphs(lambda: bind(spec, params), device)


def bind(spec: KernelSpec, params: Sequence[Tensor], keeps: bool = True) -> Bound:
    """The parameter groups as kernels take them; raises CodegenError where shapes or devices contradict each other."""
    s = spec.experts
    layout = checked_sizes(s, params)
    device = params[0].device
    if any(p.device != device for p in params):
        found = ", ".join(sorted({str(p.device) for p in params}))
        raise CodegenError(f"one layer's experts are on {found}; move them to one device")
    each = 1 if s.stacked else layout[0]
    tensors: dict[str, Tensor] = {}
    strides: list[tuple[str, Strides]] = []
    copied = False
    for i, group in enumerate(s.param_groups):
        tensor, own, copy = _group(spec, group, params[i * each : (i + 1) * each])
        tensors[group] = tensor
        strides.append((group, own))
        copied = copied or copy
    fence = Fence(device) if keeps else None
    return Bound(tensors, Layout(tuple(strides), *layout), keeps and not copied, fence)


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
