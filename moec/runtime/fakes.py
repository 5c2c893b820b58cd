"""What moec's ops give for tensors without data: shapes and dtypes, for torch's tracing.

Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moec.codegen import twin
from moec.codegen.backward_plan import saves_activations
from moec.errors import CodegenError
from moec.ir.dtypes import DTYPES
from moec.ir.engine import Engine
from moec.ir.spec import KernelSpec, widths


def saved_rows(x: Tensor, experts: Tensor, params: Sequence[Tensor], spec: str, engine: str, save: str) -> Tensor:
    """Room for what the backward pass is given: [T·k, F or 2F] where its kernel reads projections, else empty."""
    parsed = KernelSpec.parse(spec)
    s, k = parsed.experts, experts.shape[1]
    hidden, width, wide = widths(s, params)
    kinds = ("auto", "cpp", "triton") if x.device.type == "cpu" else ("auto", "triton")
    has_kernel = Engine.parse(engine).kind in kinds and params[0].dtype == DTYPES[s.dtype]
    keep = save == "always" or (save == "auto" and saves_activations(parsed, hidden, width, wide, k))
    rows, columns = (x.shape[0] * k, s.ab_views * width) if has_kernel and keep else (0, 0)
    return params[0].new_empty((rows, columns))


def moe_fake(
    x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], k: int, spec: str, engine: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, O], logits [T, E], weights and experts [T, k]."""
    parsed = KernelSpec.parse(spec)
    if parsed.router is None:
        raise CodegenError(f"moec::moe needs a spec with a router, got {spec!r}; call moec::experts")
    tokens = x.shape[0]
    return (
        _like_y(x, params, parsed, DTYPES[parsed.y_dtype]),
        x.new_empty((tokens, router[0].shape[0]), dtype=DTYPES[parsed.router.compute]),
        x.new_empty((tokens, k), dtype=DTYPES[parsed.router.weight_dtype]),
        x.new_empty((tokens, k), dtype=torch.int64),
    )


def experts_fake(
    x: Tensor, weights: Tensor, experts: Tensor, params: Sequence[Tensor], spec: str, engine: str
) -> Tensor:
    """y [T, O]."""
    parsed = KernelSpec.parse(spec)
    return _like_y(x, params, parsed, twin.y_dtype(parsed, params[0].dtype))


def _like_y(x: Tensor, params: Sequence[Tensor], spec: KernelSpec, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], widths(spec.experts, params)[2]), dtype=dtype)


def experts_training_fake(
    x: Tensor, weights: Tensor, experts: Tensor, params: Sequence[Tensor], spec: str, engine: str, save: str
) -> tuple[Tensor, Tensor]:
    """y [T, O], and what is kept for the backward pass."""
    y = experts_fake(x, weights, experts, params, spec, engine)
    return y, saved_rows(x, experts, params, spec, engine, save)


def experts_backward_fake(
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
    """The gradients of x, weights and parameters; empty where none is needed."""
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weights.new_empty(weights.shape if needs[1] else 0),
        [p.new_empty(p.shape if n else (0,) * p.dim()) for p, n in zip(params, needs[2:], strict=True)],
    )


def slopes_of(x: Tensor, experts: Tensor, params: Sequence[Tensor], spec: str) -> Tensor:
    """Room for the gradients by what φ reads, [T·k, F or 2F], in the order of experts."""
    s = KernelSpec.parse(spec).experts
    return params[0].new_empty((x.shape[0] * experts.shape[1], s.ab_views * widths(s, params)[1]))


def of_step(spec: str, needs: Sequence[bool], last: bool) -> list[bool]:
    """Of the gradients that are wanted, those of one step: of the last product, or of the first."""
    s = KernelSpec.parse(spec).experts
    each = (len(needs) - 2) // len(s.param_groups)
    own = [(group in ("out", "bias_out")) == last for group in s.param_groups for _ in range(each)]
    in_step = (not last, (s.weight_on == "output") == last, *own)
    return [need and here for need, here in zip(needs, in_step, strict=True)]


def backward_last_fake(
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
    """The slopes, and the gradients of the first step."""
    mine = of_step(spec, needs, last=True)
    found = experts_backward_fake(grad, x, weights, experts, params, saved, spec, engine, mine)
    return (slopes_of(x, experts, params, spec), *found[1:])


def backward_first_fake(
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
    """The gradients of the second step."""
    mine = of_step(spec, needs, last=False)
    return experts_backward_fake(grad, x, weights, experts, params, slopes, spec, engine, mine)
