"""The ops that compiled graphs call: moec::moe, moec::experts and its gradient, over generated kernels or the twin.

Importing this module registers them. `spec` is a KernelSpec's text; `engine` is auto, cpp, triton or eager.
Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moec.codegen import twin
from moec.errors import BuildError, CodegenError
from moec.runtime_cpu import Kernel, kernel_source, load_kernel
from moec.runtime_triton import TritonKernel, load_triton
from moec.spec import DTYPES, KernelSpec

__all__ = ["kernel_source"]

_LIB = torch.library.Library("moec", "FRAGMENT")
_AnyKernel = Kernel | TritonKernel
_TAGS = (torch.Tag.pt2_compliant_tag,)

_LIB.define(
    "moe(Tensor x, Tensor[] router, Tensor[] params, int k, str spec, str engine)"
    " -> (Tensor y, Tensor logits, Tensor weights, Tensor experts)",
    tags=_TAGS,
)
_LIB.define(
    "experts(Tensor x, Tensor weights, Tensor experts, Tensor[] params, str spec, str engine) -> Tensor", tags=_TAGS
)
_LIB.define(
    "experts_backward(Tensor grad, Tensor x, Tensor weights, Tensor experts, Tensor[] params, str spec, bool[] needs)"
    " -> (Tensor, Tensor, Tensor[])",
    tags=_TAGS,
)


def _kernel(spec: str, engine: str, device: torch.device, router_dtype: torch.dtype | None) -> _AnyKernel | None:
    """The kernel for a call, or None for the twin. An engine asked for by name raises where it has none."""
    if engine == "eager":
        return None
    if engine == "cpp" and device.type != "cpu":
        raise CodegenError(f"engine 'cpp' has kernels for cpu only, got tensors on {device}; use engine 'auto'")
    if engine == "auto":
        return _kernel_or_warning(spec, device, router_dtype)
    return load_triton(spec, device) if engine == "triton" else load_kernel(spec, router_dtype)


@lru_cache(maxsize=1024)
def _kernel_or_warning(spec: str, device: torch.device, router_dtype: torch.dtype | None) -> _AnyKernel | None:
    try:
        return load_kernel(spec, router_dtype) if device.type == "cpu" else load_triton(spec, device)
    except (BuildError, CodegenError) as error:
        _warn_once(str(error))
        return None


@lru_cache(maxsize=64)
def _warn_once(reason: str) -> None:
    warnings.warn(f"moec: eager experts instead of a kernel: {reason}", RuntimeWarning, stacklevel=2)


def _moe(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], k: int, spec: str, engine: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = _kernel(spec, engine, x.device, router[0].dtype)
    if kernel is not None and kernel.takes(x, params):
        return kernel.moe(x, router, params, k)
    parsed = KernelSpec.parse(spec)
    if parsed.router is None:
        raise CodegenError(f"moec::moe needs a spec with a router, got {spec!r}; call moec::experts")
    logits, weights, experts = twin.route(x, router, k, parsed.router)
    return twin.experts(x, weights, experts, params, parsed), logits, weights, experts


def _experts(x: Tensor, weights: Tensor, experts: Tensor, params: Sequence[Tensor], spec: str, engine: str) -> Tensor:
    kernel = _kernel(spec, engine, x.device, None)
    if kernel is not None and kernel.takes(x, params):
        return kernel.experts(x, weights, experts, params)
    return twin.experts(x, weights, experts, params, KernelSpec.parse(spec))


def _experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    spec: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return twin.experts_backward(grad, x, weights, experts, params, KernelSpec.parse(spec), needs)


def _moe_fake(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], k: int, spec: str, engine: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parsed = KernelSpec.parse(spec)
    if parsed.router is None:
        raise CodegenError(f"moec::moe needs a spec with a router, got {spec!r}; call moec::experts")
    tokens = x.shape[0]
    return (
        x.new_empty(x.shape, dtype=DTYPES[parsed.y_dtype]),
        x.new_empty((tokens, router[0].shape[0]), dtype=DTYPES[parsed.router.compute]),
        x.new_empty((tokens, k), dtype=DTYPES[parsed.router.weight_dtype]),
        x.new_empty((tokens, k), dtype=torch.int64),
    )


def _experts_fake(
    x: Tensor, weights: Tensor, experts: Tensor, params: Sequence[Tensor], spec: str, engine: str
) -> Tensor:
    return x.new_empty(x.shape, dtype=twin.y_dtype(KernelSpec.parse(spec), params[0].dtype))


def _experts_backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    spec: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weights.new_empty(weights.shape if needs[1] else 0),
        [torch.empty_like(p) if n else p.new_empty((0,) * p.dim()) for p, n in zip(params, needs[2:], strict=True)],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, experts, params, spec, _ = inputs
    ctx.spec, ctx.count = spec, len(params)
    ctx.save_for_backward(x, weights, experts, *params)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weights, experts, *params = ctx.saved_tensors
    wants = ctx.needs_input_grad
    needs = [wants[0], wants[1], *_param_needs(wants[3], ctx.count)]
    dx, dweights, dparams = torch.ops.moec.experts_backward(grad, x, weights, experts, params, ctx.spec, needs)
    return (
        dx if needs[0] else None,
        dweights if needs[1] else None,
        None,
        [d if n else None for d, n in zip(dparams, needs[2:], strict=True)],
        None,
        None,
    )


def _param_needs(wants: Any, count: int) -> list[bool]:
    """One flag a parameter; torch gives a list for a tensor list, or one flag for all of it."""
    return [bool(w) for w in wants] if isinstance(wants, (list, tuple)) else [bool(wants)] * count


_OPS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("moe", _moe, _moe_fake),
    ("experts", _experts, _experts_fake),
    ("experts_backward", _experts_backward, _experts_backward_fake),
)
for _name, _real, _fake in _OPS:
    _LIB.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moec::{_name}", _fake, lib=_LIB)
torch.library.register_autograd("moec::experts", _backward, setup_context=_save, lib=_LIB)
