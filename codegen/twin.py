"""The eager twins: routing, experts and their gradients in plain torch, on any device and dtype.

They are the reference that kernels are compared with and the fallback where no kernel can be built.
Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from moec.codegen.codes import decoded
from moec.ir.dtypes import DTYPES
from moec.ir.expr import derivative, evaluate
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec, widths


def route(x: Tensor, router: Sequence[Tensor], k: int, spec: RouterSpec) -> tuple[Tensor, Tensor, Tensor]:
    """x[T, H] → logits[T, E] (compute dtype), weights[T, k] (weight dtype), experts[T, k] (int64).

    A double-precision twin (x and W in fp64) stays so throughout.
    `router` is W[E, H], then bias[E] and selection_bias[E] where the spec has them.
    """
    rest = list(router[1:])
    double = x.dtype == router[0].dtype == torch.float64
    compute, score_dtype, weight_dtype = (
        torch.float64 if double else DTYPES[name] for name in (spec.compute, spec.score_dtype, spec.weight_dtype)
    )
    bias = rest.pop(0).to(compute) if spec.bias else None
    logits = nnf.linear(x.to(compute), router[0].to(compute), bias)
    score = _scores(logits.to(_wide(compute)), spec).to(score_dtype)
    choice = logits if spec.choose_by == "logits" else score
    choice = choice + rest.pop(0) if spec.selection_bias else choice
    if spec.groups > 1:
        choice = _keep_best_groups(choice, spec)
    experts = torch.topk(choice, k, dim=-1, sorted=spec.sorted).indices
    weights = (choice if spec.weight_from == "choice" else score).gather(-1, experts)
    if spec.softmax_over_k:
        weights = weights.softmax(-1)
    if spec.renormalize:
        total = weights.sum(-1, keepdim=True)
        total = total + spec.eps if spec.eps else total
        weights = weights / (total.clamp(min=spec.clamp_min) if spec.clamp_min else total)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return logits, weights.to(weight_dtype), experts


def _scores(logits: Tensor, spec: RouterSpec) -> Tensor:
    """logits[T, E] → the score of each expert, in the dtype of the logits."""
    env = {"logits": logits}
    if spec.softmax:
        env = {"softmax": evaluate(spec.softened, env).softmax(-1)}
    return evaluate(spec.scored, env)


def _keep_best_groups(choice: Tensor, spec: RouterSpec) -> Tensor:
    """choice[T, E] with `masked_value` outside the `topk_group` best of `groups` groups."""
    grouped = choice.unflatten(-1, (spec.groups, -1))
    few = min(2, grouped.shape[-1])
    score = grouped.topk(few, dim=-1).values.sum(-1) if spec.group_score == "top2_sum" else grouped.amax(-1)
    best = torch.topk(score, spec.topk_group, dim=-1, sorted=False).indices
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
    return grouped.masked_fill(~keep.unsqueeze(-1), spec.masked_value).flatten(-2)


@dataclass(frozen=True)
class Expert:
    """One expert's parameters as views: w_a and w_b are [F, H], w_out is [O, F] or None, as biases are."""

    w_a: Tensor
    w_b: Tensor | None
    w_out: Tensor | None
    b_a: Tensor | None
    b_b: Tensor | None
    b_out: Tensor | None


def expert(params: Sequence[Tensor], spec: ExpertsSpec, e: int) -> Expert:
    """Expert `e` of the flat parameter list: a group is one tensor [E, …] when stacked, else E tensors."""
    return _views(selected(params, spec, e), spec)


def selected(params: Sequence[Tensor], spec: ExpertsSpec, e: int) -> dict[str, Tensor]:
    """Expert `e`'s part of each parameter group; what is empty as a whole stays empty."""
    groups = spec.param_groups
    if not spec.stacked:
        return {g: params[i * (len(params) // len(groups)) + e] for i, g in enumerate(groups)}
    return {g: p[e] if p.numel() else p.new_empty((0,) * (p.dim() - 1)) for g, p in zip(groups, params, strict=True)}


def _views(named: dict[str, Tensor], spec: ExpertsSpec) -> Expert:
    named = _dequantised(named, spec)
    nk_in, nk_out = spec.layout_in == "nk", spec.layout_out == "nk"
    w_out = None if not spec.out else named["out"] if nk_out else named["out"].t()
    if spec.gate == "separate":
        w_a, w_b = (named[g] if nk_in else named[g].t() for g in ("a", "b"))
        return Expert(w_a, w_b, w_out, named.get("bias_a"), named.get("bias_b"), named.get("bias_out"))
    w_a, w_b = _halves(named["ab"] if nk_in else named["ab"].t(), spec.gate)
    b_a, b_b = _halves(named["bias_ab"], spec.gate) if spec.bias_in else (None, None)
    return Expert(w_a, w_b, w_out, b_a, b_b, named.get("bias_out"))


def _dequantised(named: dict[str, Tensor], spec: ExpertsSpec) -> dict[str, Tensor]:
    """Parameters that are codes as the numbers that they stand for, in the dtype of the products."""
    if spec.coding is None:
        return named
    found = {g: p for g, p in named.items() if g.startswith("bias_")}
    for group in named:
        if group in found or group.startswith("scale_"):
            continue
        turn = spec.layout(group) == "kn"
        codes, scales = named[group], named.get(f"scale_{group}", named[group])
        if not codes.numel():  # the gradient that nobody wants
            found[group] = codes
            continue
        wide = decoded(codes.t(), scales.t(), spec.coding).t() if turn else decoded(codes, scales, spec.coding)
        found[group] = wide if wide.dtype == torch.float64 else wide.to(DTYPES[spec.dtype])
    return found


def _halves(ab: Tensor, gate: str) -> tuple[Tensor, Tensor | None]:
    """What belongs to a and to b among the leading rows of `ab`."""
    if gate == "none":
        return ab, None
    if gate == "interleaved":
        return ab[0::2], ab[1::2]
    half = ab.shape[0] // 2
    return ab[:half], ab[half:]


def num_experts(params: Sequence[Tensor], spec: ExpertsSpec) -> int:
    """E, from the parameters."""
    return params[0].shape[0] if spec.stacked else len(params) // len(spec.param_groups)


def _hits(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens, slots) of each expert in [0, count) that occurs in experts[T, k]."""
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ids, sizes = torch.unique_consecutive(flat[order], return_counts=True)
    begin = 0
    for e, size in zip(ids.tolist(), sizes.tolist(), strict=True):
        pairs = order[begin : begin + size]
        begin += size
        if 0 <= e < count:
            yield e, pairs // experts.shape[1], pairs % experts.shape[1]


def _products(params: Sequence[Tensor], s: ExpertsSpec) -> torch.dtype:
    """The dtype in which rows meet matrices; a double-precision twin stays so."""
    if not s.codes:
        return params[0].dtype
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else DTYPES[s.dtype]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and activations."""
    return torch.promote_types(dtype, torch.float32)


def _phi_inputs(rows: Tensor, at: Expert, wide: torch.dtype) -> dict[str, Tensor]:
    env = {"a": _linear(rows, at.w_a, at.b_a, wide)}
    if at.w_b is not None:
        env["b"] = _linear(rows, at.w_b, at.b_b, wide)
    return env


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """rows · weightᵀ + bias in `wide`; a bias of another dtype is added to what the product was rounded to."""
    if bias is None or bias.dtype == rows.dtype:
        return nnf.linear(rows, weight, bias).to(wide)
    return nnf.linear(rows, weight).to(wide) + bias.to(wide)


def experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    spec: KernelSpec,
    saved: Tensor | None = None,
) -> Tensor:
    """x[T, H], weights[T, k], experts[T, k] → y[T, O] in y_dtype.

    Projections run in the weights' dtype, the activation and the sum over slots in fp32 (fp64 for fp64 weights).
    A slot whose expert is outside [0, E) contributes nothing. `saved`[T·k, F or 2F] is given the projections of each
    pair, a then b, for a kernel's backward.
    """
    s = spec.experts
    dtype = _products(params, s)
    wide = _wide(dtype)
    y = torch.zeros((x.shape[0], widths(s, params)[2]), dtype=wide, device=x.device)
    for e, tokens, slots in _hits(experts, num_experts(params, s)):
        at, w = expert(params, s, e), weights[tokens, slots].to(wide).unsqueeze(-1)
        rows = x[tokens]
        rows = (rows.to(wide) * w).to(dtype) if s.weight_on == "input" else rows.to(dtype)
        env = _phi_inputs(rows, at, wide)
        if saved is not None:
            saved[tokens * experts.shape[1] + slots] = torch.cat(list(env.values()), -1).to(saved.dtype)
        h = evaluate(s.phi, env).to(dtype)
        out = h.to(wide) if at.w_out is None else _linear(h, at.w_out, at.b_out, wide)
        y.index_add_(0, tokens, out if s.weight_on == "input" else out * w)
    return y.to(y_dtype(spec, dtype))


def y_dtype(spec: KernelSpec, params: torch.dtype) -> torch.dtype:
    """The dtype of y: the spec's, except that a double-precision twin stays so."""
    return params if params == torch.float64 else DTYPES[spec.y_dtype]


def experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    spec: KernelSpec,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of `experts` by x, weights and each parameter, in their shapes and dtypes.

    `needs` says which are wanted, in that order; the others come back empty. Sums are fp32; an expert without
    tokens gets zeros.
    """
    s, wide = spec.experts, _wide(_products(params, spec.experts))
    dx = torch.zeros(x.shape, dtype=wide, device=x.device) if needs[0] else None
    dw = torch.zeros(weights.shape, dtype=wide, device=x.device) if needs[1] else None
    dparams = [
        p.new_zeros(p.shape) if n else p.new_empty((0,) * p.dim()) for p, n in zip(params, needs[2:], strict=True)
    ]
    for e, tokens, slots in _hits(experts, num_experts(params, s)):
        rows, w, g = x[tokens].to(wide), weights[tokens, slots].to(wide).unsqueeze(-1), grad[tokens].to(wide)
        drows, dscale = _expert_backward(g, rows, w, expert(params, s, e), expert(dparams, s, e), spec)
        if dx is not None:
            dx.index_add_(0, tokens, drows)
        if dw is not None:
            dw[tokens, slots] = dscale
    return (
        x.new_empty(0) if dx is None else dx.to(x.dtype),
        weights.new_empty(0) if dw is None else dw.to(weights.dtype),
        dparams,
    )


def _expert_backward(
    g: Tensor, rows: Tensor, w: Tensor, at: Expert, grads: Expert, spec: KernelSpec
) -> tuple[Tensor, Tensor]:
    """g[m, O], rows[m, H], w[m, 1] of one expert → gradients by rows and w; the parameters' go into `grads`."""
    s, dtype, wide = spec.experts, at.w_a.dtype, rows.dtype
    on_input = s.weight_on == "input"
    scaled = (rows * w).to(dtype) if on_input else rows.to(dtype)
    env = _phi_inputs(scaled, at, wide)
    h = evaluate(s.phi, env).to(dtype).to(wide)
    scaled, w_out = scaled.to(wide), None if at.w_out is None else at.w_out.to(wide)
    g_out = g if on_input else g * w
    dh = g_out if w_out is None else g_out @ w_out
    if grads.w_out is not None:
        _put(grads.w_out, g_out, h)
    _put_bias(grads.b_out, g_out)
    drows = torch.zeros_like(rows)
    for name, weight, dweight, dbias in (("a", at.w_a, grads.w_a, grads.b_a), ("b", at.w_b, grads.w_b, grads.b_b)):
        if weight is None or dweight is None:
            continue
        slope = dh * evaluate(derivative(s.phi, name), env)
        drows.addmm_(slope, weight.to(wide))
        _put(dweight, slope, scaled)
        _put_bias(dbias, slope)
    if on_input:
        return drows * w, (drows * rows).sum(-1)
    out = h if w_out is None else h @ w_out.t()
    out = out if at.b_out is None else out + at.b_out.to(wide)
    return drows, (g * out.to(dtype).to(wide)).sum(-1)


def _put(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into = leftᵀ · right, unless it is not wanted."""
    if into.numel() == 0:
        return
    if into.dtype == left.dtype and into.is_contiguous():
        torch.mm(left.t(), right, out=into)
    else:
        into.copy_(left.t() @ right)


def _put_bias(into: Tensor | None, rows: Tensor) -> None:
    if into is not None and into.numel():
        into.copy_(rows.sum(0))
