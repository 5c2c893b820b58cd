"""The ops that compiled graphs call: moec::moe, moec::experts and its gradient, over generated kernels or the twin.

`save` is an option's value: whether moec::experts_training keeps projections for the backward pass.

Importing this module registers them. `spec` is a KernelSpec's text, `engine` an Engine's.
Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from moec.codegen import twin
from moec.errors import BuildError, CodegenError, MoecError, OptionError
from moec.ir.dtypes import DTYPE_NAMES
from moec.ir.engine import Engine
from moec.ir.spec import KernelSpec
from moec.runtime.backward_ops import backward_first, backward_last, experts_backward, gradients
from moec.runtime.coded import coded_kernel
from moec.runtime.cpu import Again, Kernel, kernel_source, load_kernel
from moec.runtime.fakes import (
    backward_first_fake,
    backward_last_fake,
    experts_backward_fake,
    experts_fake,
    experts_training_fake,
    moe_fake,
    saved_rows,
)
from moec.runtime.fallback import or_twin, takes_or_raise, warn_once
from moec.runtime.packed import packed_kernel
from moec.runtime.race import racer
from moec.runtime.reserve import forward_bytes, most_tokens, reserve
from moec.runtime.triton import TritonKernel, load_triton

__all__ = ["kernel_source"]

_LIB = torch.library.Library("moec", "FRAGMENT")
_T = TypeVar("_T")
_AnyKernel = Kernel | TritonKernel
_TAGS = (torch.Tag.pt2_compliant_tag,)

_MOE = (
    "(Tensor x, Tensor[] router, Tensor[] params, int k, str spec, str engine)"
    " -> (Tensor y, Tensor logits, Tensor weights, Tensor experts)"
)
_EXPERTS = "(Tensor x, Tensor weights, Tensor experts, Tensor[] params, str spec, str engine) -> Tensor"
_LIB.define(f"moe{_MOE}", tags=_TAGS)
_LIB.define(f"experts{_EXPERTS}", tags=_TAGS)
_LIB.define(f"moe_anew{_MOE}", tags=_TAGS)  # where calls.cpp does not know the call
_LIB.define(f"experts_anew{_EXPERTS}", tags=_TAGS)
_LIB.define(  # experts where a gradient is wanted: also what its backward is to be given, empty where that is nothing
    "experts_training(Tensor x, Tensor weights, Tensor experts, Tensor[] params, str spec, str engine, str save)"
    " -> (Tensor y, Tensor saved)",
    tags=_TAGS,
)
_LIB.define(
    "experts_backward(Tensor grad, Tensor x, Tensor weights, Tensor experts, Tensor[] params, Tensor saved, str spec,"
    " str engine, bool[] needs) -> (Tensor, Tensor, Tensor[])",
    tags=_TAGS,
)
_LIB.define(  # the same in two steps: what forward saved is needed by the first alone
    "experts_backward_last(Tensor grad, Tensor x, Tensor weights, Tensor experts, Tensor[] params, Tensor saved,"
    " str spec, str engine, bool[] needs) -> (Tensor, Tensor, Tensor[])",
    tags=_TAGS,
)
_LIB.define(
    "experts_backward_first(Tensor slopes, Tensor grad, Tensor x, Tensor weights, Tensor experts, Tensor[] params,"
    " str spec, str engine, bool[] needs) -> (Tensor, Tensor, Tensor[])",
    tags=_TAGS,
)


def _kernel(spec: str, mode: Engine, device: torch.device, router_dtype: torch.dtype | None) -> _AnyKernel | None:
    """The kernel for a call, or None for the twin. An engine asked for by name raises where it has none."""
    engine = mode.kind
    if engine == "eager":
        return None
    if engine == "cpp" and device.type != "cpu":
        raise OptionError(f"option kernels='cpp': has kernels for cpu only, got tensors on {device}; use 'auto'")
    if engine == "auto":
        return _kernel_or_warning(spec, device, router_dtype, mode.combine, mode.schedule)
    triton = engine == "triton"
    return load_triton(spec, device, mode.combine, mode.schedule) if triton else load_kernel(spec, router_dtype)


@lru_cache(maxsize=1024)
def _kernel_or_warning(
    spec: str, device: torch.device, router_dtype: torch.dtype | None, combine: str, schedule: str
) -> _AnyKernel | None:
    try:
        if device.type == "cpu":
            return load_kernel(spec, router_dtype)
        return load_triton(spec, device, combine, schedule)
    except (BuildError, CodegenError) as error:
        warn_once(str(error))
        return None


def _moe(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], k: int, spec: str, engine: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mode = Engine.parse(engine)
    kernel = _chosen(x, params, spec, mode, router[0].dtype)
    if kernel is None:
        return _twin_moe(x, router, params, k, spec)
    if isinstance(kernel, TritonKernel):
        return or_twin(
            mode,
            lambda: kernel.moe(x, router, params, k, mode.tokens),
            lambda: _twin_moe(x, router, params, k, spec),
        )
    ready = _packed(kernel, mode, spec, router[0].dtype, params)
    again = _again(ready, mode, x, params, k)

    def call(chosen: Kernel | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return chosen.moe(x, router, params, k, again) if chosen else _twin_moe(x, router, params, k, spec)

    return _opted(ready, mode, x, params, k, call)


def _chosen(
    x: Tensor, params: Sequence[Tensor], spec: str, mode: Engine, router_dtype: torch.dtype | None
) -> _AnyKernel | None:
    """The kernel that runs, or None for the twin; warns once where it leaves race, freeze and weights unused."""
    kernel = _kernel(spec, mode, x.device, router_dtype)
    if kernel is not None and not takes_or_raise(kernel.takes(x, params), spec, mode.kind, (x, *params)):
        kernel = None
    if isinstance(kernel, TritonKernel) and mode.weights != "stored":
        kernel = coded_kernel(kernel, mode.weights, params)
    if not mode.plain and not isinstance(kernel, Kernel):
        _warn_unused(mode, isinstance(kernel, TritonKernel))
    return kernel


@lru_cache(maxsize=64)
def _warn_unused(mode: Engine, triton: bool) -> None:
    """Say once which options the kernel that runs leaves unused."""
    if triton and not mode.race:
        return
    unused = "race is" if triton else "race, freeze and weights are"
    read = "" if triton else "; weights are read as stored"
    warnings.warn(f"moec: {str(mode)!r}: {unused} for C++ kernels on a CPU{read}", RuntimeWarning, stacklevel=2)


def _opted(
    kernel: Kernel, mode: Engine, x: Tensor, params: Sequence[Tensor], k: int, call: Callable[[Kernel | None], _T]
) -> _T:
    """`call` of the kernel that the options ask for; None stands for eager's form."""
    exact = mode.weights in ("stored", "packed")  # eager's form computes with the weights as they are
    if mode.race and exact and x.numel():
        return racer(kernel).run(kernel.sizes(x, params, k), call)
    return call(kernel)


def _twin_moe(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], k: int, spec: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parsed = KernelSpec.parse(spec)
    if parsed.router is None:
        raise CodegenError(f"moec::moe needs a spec with a router, got {spec!r}; call moec::experts")
    logits, weights, experts = twin.route(x, router, k, parsed.router)
    return twin.experts(x, weights, experts, params, parsed), logits, weights, experts


def _experts(x: Tensor, weights: Tensor, experts: Tensor, params: Sequence[Tensor], spec: str, engine: str) -> Tensor:
    mode = Engine.parse(engine)
    kernel = _chosen(x, params, spec, mode, None)
    if isinstance(kernel, TritonKernel):
        return or_twin(
            mode,
            lambda: kernel.experts(x, weights, experts, params, mode.capacity, mode.tokens),
            lambda: twin.experts(x, weights, experts, params, KernelSpec.parse(spec)),
        )

    if kernel is None:
        return twin.experts(x, weights, experts, params, KernelSpec.parse(spec))
    ready = _packed(kernel, mode, spec, None, params)
    again = _again(ready, mode, x, params, experts.shape[1])

    def call(chosen: Kernel | None) -> Tensor:
        if chosen is None:
            return twin.experts(x, weights, experts, params, KernelSpec.parse(spec))
        return chosen.experts(x, weights, experts, params, again=again)

    return _opted(ready, mode, x, params, experts.shape[1], call)


def _again(kernel: Kernel, mode: Engine, x: Tensor, params: Sequence[Tensor], k: int) -> Again | None:
    """How calls like this one may skip Python; None where a race is to see each call."""
    reserved = _reserved(kernel, mode, x, params, k)
    return None if mode.race else Again(reserved)


def _reserved(kernel: Kernel, mode: Engine, x: Tensor, params: Sequence[Tensor], k: int) -> int:
    """Bytes of workspace for every call of the declared range of T, taken; 0 where none is declared."""
    if not mode.tokens or not x.numel():
        return 0
    most = replace(kernel.sizes(x, params, k), T=most_tokens(mode, x.shape[0]))
    threads, storage = torch.get_num_threads(), kernel.storage()
    size = forward_bytes(kernel.spec, most, DTYPE_NAMES[x.dtype], kernel.target, threads, storage)
    reserve(size, mode, x.shape[0])
    return size


def _packed(
    kernel: Kernel, mode: Engine, spec: str, router_dtype: torch.dtype | None, params: Sequence[Tensor]
) -> Kernel:
    """The kernel that reads the weights as the options say."""
    if mode.weights == "stored":
        return kernel
    return packed_kernel(spec, mode.weights, router_dtype, params) or kernel


def _experts_training(
    x: Tensor, weights: Tensor, experts: Tensor, params: Sequence[Tensor], spec: str, engine: str, save: str
) -> tuple[Tensor, Tensor]:
    saved = saved_rows(x, experts, params, spec, engine, save)
    if saved.numel() == 0:
        return _experts(x, weights, experts, params, spec, engine), saved
    mode = Engine.parse(engine)
    kernel = _chosen(x, params, spec, mode, None)
    if isinstance(kernel, Kernel):
        _reserved(kernel, mode, x, params, experts.shape[1])
        return kernel.experts(x, weights, experts, params, saved), saved

    def eager() -> Tensor:
        return twin.experts(x, weights, experts, params, KernelSpec.parse(spec), saved)

    if not isinstance(kernel, TritonKernel):
        return eager(), saved

    def run() -> Tensor:
        return kernel.experts(x, weights, experts, params, mode.capacity, mode.tokens, saved)

    return or_twin(mode, run, eager), saved


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, experts, params, *texts = inputs
    _keep(ctx, x, weights, experts, params, x.new_empty(0), texts)


def _save_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, experts, params, *texts = inputs
    ctx.mark_non_differentiable(output[1])
    _keep(ctx, x, weights, experts, params, output[1], texts)


def _keep(
    ctx: Any, x: Tensor, weights: Tensor, experts: Tensor, params: Sequence[Tensor], saved: Tensor, texts: list[str]
) -> None:
    ctx.texts, ctx.count = texts, len(params)
    ctx.save_for_backward(x, weights, experts, saved, *params)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, weights, experts, saved, *params = ctx.saved_tensors
    spec, engine = ctx.texts[:2]
    needs = wanted(ctx)
    found = gradients(grad, x, weights, experts, params, saved, spec, engine, needs)
    return by_input(ctx, needs, *found)


def wanted(ctx: Any) -> list[bool]:
    """Which gradients torch asks an op of experts for: of x, of the weights, of each of `ctx.count` parameters."""
    x, weights, _, params = ctx.needs_input_grad[:4]
    each = params if isinstance(params, (list, tuple)) else [params] * ctx.count  # torch may give one flag for all
    return [x, weights, *map(bool, each)]


def by_input(
    ctx: Any, needs: Sequence[bool], dx: Tensor, dweights: Tensor, dparams: Sequence[Tensor]
) -> tuple[Any, ...]:
    """Gradients as torch takes them: one for each input of the op (x, weights, experts, params, texts), or None."""
    return (
        dx if needs[0] else None,
        dweights if needs[1] else None,
        None,
        [d if n else None for d, n in zip(dparams, needs[2:], strict=True)],
        *(None for _ in ctx.texts),
    )


def no_second_gradient(ctx: Any, *_: Any) -> NoReturn:
    """The gradient of a gradient, which no kernel computes."""
    raise MoecError(
        "the gradient of experts' gradients is not computed by moec (create_graph=True, a penalty, a Hessian); "
        "call the model that was compiled, not the compiled one, where it is needed"
    )


Ops = Sequence[tuple[str, Callable[..., Any], Callable[..., Any]]]
"""Names of ops, what they do, and what they give for tensors without data."""

_OPS: Ops = (
    ("moe", _moe, moe_fake),
    ("moe_anew", _moe, moe_fake),
    ("experts", _experts, experts_fake),
    ("experts_anew", _experts, experts_fake),
    ("experts_training", _experts_training, experts_training_fake),
    ("experts_backward", experts_backward, experts_backward_fake),
    ("experts_backward_last", backward_last, backward_last_fake),
    ("experts_backward_first", backward_first, backward_first_fake),
)


def outside_autocast(real: Callable[..., _T]) -> Callable[..., _T]:
    """`real`, which makes the casts that its spec names and no others; its first argument is a tensor."""

    @wraps(real)
    def call(*args: Any) -> _T:
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return real(*args)
        with torch.autocast(device, enabled=False):
            return real(*args)

    return call


def register(library: torch.library.Library, ops: Ops) -> None:
    """Give ops that `library` defines their meaning."""
    for name, real, fake in ops:
        library.impl(name, outside_autocast(real), "CompositeExplicitAutograd")
        torch.library.register_fake(f"moec::{name}", fake, lib=library)


register(_LIB, _OPS)
for _name in ("experts_backward", "experts_backward_last", "experts_backward_first"):
    torch.library.register_autograd(f"moec::{_name}", no_second_gradient, lib=_LIB)
torch.library.register_autograd("moec::experts", _backward, setup_context=_save, lib=_LIB)
torch.library.register_autograd("moec::experts_training", _backward, setup_context=_save_training, lib=_LIB)
