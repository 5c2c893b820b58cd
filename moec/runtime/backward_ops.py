"""The ops of the experts' gradients: all at once, or in two steps between which what forward kept can be freed.

Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from moec.codegen import twin
from moec.errors import BuildError, CodegenError
from moec.ir.dtypes import DTYPE_NAMES
from moec.ir.engine import Engine
from moec.ir.spec import KernelSpec
from moec.runtime.backward import BackwardKernel, fresh, load_backward
from moec.runtime.fakes import of_step, slopes_of
from moec.runtime.fallback import or_twin, takes_or_raise, warn_once
from moec.runtime.gradients import gradient_memory
from moec.runtime.reserve import backward_bytes, most_rows, most_tokens, reserve
from moec.runtime.triton_backward import TritonBackward, load_triton_backward

_LEAST_FREED = 32 << 20
"""Bytes that forward kept from which on freeing them early is worth a second op: its launches cost some 50 µs."""


def experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    saved: Tensor,
    spec: str,
    engine: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    mode = Engine.parse(engine)
    kind = mode.kind
    kernel = gradient_kernel(spec, kind, x.device)

    def eager() -> tuple[Tensor, Tensor, list[Tensor]]:
        return twin.experts_backward(grad, x, weights, experts, params, KernelSpec.parse(spec), needs)

    if kernel is None or not takes_or_raise(kernel.takes(grad, x, params), spec, kind, (grad, x, *params)):
        return eager()
    if isinstance(kernel, TritonBackward):
        kept = saved if saved.numel() else None
        return or_twin(mode, lambda: kernel(grad, x, weights, experts, params, needs, kept), eager)
    if mode.tokens and x.numel():
        most = most_tokens(mode, x.shape[0])
        sizes = replace(kernel.sizes(x, params, experts.shape[1]), T=most)
        limit, threads = most_rows(mode, most), torch.get_num_threads()
        size = backward_bytes(kernel.spec, sizes, DTYPE_NAMES[x.dtype], kernel.target, threads, limit)
        reserve(size, mode, x.shape[0])
    take = fresh if mode.fresh else gradient_memory().take
    return kernel(grad, x, weights, experts, params, saved if saved.numel() else None, needs, take)


def backward_last(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    saved: Tensor,
    spec: str,
    engine: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The first of two steps: gradients by what φ read [T·k, F or 2F], of the last product, of the weights it has."""
    slopes = slopes_of(x, experts, params, spec)
    mine = of_step(spec, needs, last=True)
    return (slopes, *_step("last", slopes, grad, x, weights, experts, params, saved, spec, engine, mine)[1:])


def backward_first(
    slopes: Tensor,
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    spec: str,
    engine: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The second step, from `slopes`: what `backward_last` has left. Where no kernel runs, all is computed anew."""
    mine = of_step(spec, needs, last=False)
    return _step("first", slopes, grad, x, weights, experts, params, None, spec, engine, mine)


def _step(
    step: str,
    slopes: Tensor,
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    saved: Tensor | None,
    spec: str,
    engine: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One of the two steps, by its kernels, which write (`last`) or read (`first`) the slopes; or by the twin."""
    mode = Engine.parse(engine)
    kernel = gradient_kernel(spec, mode.kind, x.device)

    def eager() -> tuple[Tensor, Tensor, list[Tensor]]:
        return twin.experts_backward(grad, x, weights, experts, params, KernelSpec.parse(spec), needs)

    fits = kernel is not None and takes_or_raise(kernel.takes(grad, x, params), spec, mode.kind, (grad, x, *params))
    if not fits or not isinstance(kernel, TritonBackward):
        return eager()
    return or_twin(mode, partial(kernel, grad, x, weights, experts, params, needs, saved, step, slopes), eager)


def in_steps(x: Tensor, saved: Tensor, spec: str, engine: str, needs: Sequence[bool]) -> bool:
    """Whether gradients are computed in two steps: what forward kept is large, and no step is without a parameter."""
    kind = Engine.parse(engine).kind
    if saved.dim() < 2 or saved.shape[1] == 0 or not (kind == "triton" or (kind == "auto" and x.device.type == "cuda")):
        return False
    if not all(any(of_step(spec, needs, last)[2:]) for last in (True, False)):
        return False
    rows: Any = saved.shape[0]  # a symbol: any number of tokens may come
    return not isinstance(rows, int) or rows * saved.shape[1] * saved.element_size() >= _LEAST_FREED


def gradients(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    saved: Tensor,
    spec: str,
    engine: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """What a graph computes: the gradients by x, weights and parameters, by one op or by two."""
    ops: Any = torch.ops.moec
    if not in_steps(x, saved, spec, engine, needs):
        return ops.experts_backward(grad, x, weights, experts, params, saved, spec, engine, needs)
    slopes, of_output, last = ops.experts_backward_last(grad, x, weights, experts, params, saved, spec, engine, needs)
    dx, of_input, first = ops.experts_backward_first(slopes, grad, x, weights, experts, params, spec, engine, needs)
    own = of_step(spec, needs, last=True)
    merged = [a if here else b for a, b, here in zip(last, first, own[2:], strict=True)]
    return dx, of_output if own[1] else of_input, merged


@lru_cache(maxsize=1024)
def gradient_kernel(spec: str, kind: str, device: torch.device) -> BackwardKernel | TritonBackward | None:
    """The kernels of the gradients, or None for the twin. An engine asked for by name raises where it has none."""
    if kind == "eager" or (kind == "cpp" and device.type != "cpu"):
        return None
    try:
        triton = kind == "triton" or device.type != "cpu"
        return load_triton_backward(spec, device) if triton else load_backward(spec)
    except (BuildError, CodegenError) as error:
        if kind != "auto":
            raise
        warn_once(str(error))
        return None
