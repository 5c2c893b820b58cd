"""An independent reference: one MoE layer in float64, one token and one slot at a time, and ways to make layers."""

from __future__ import annotations

import torch

from moec.codegen import twin
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, widths

_GATE = "mul(clamp_max(a, 7.0), sigmoid(mul(1.702, clamp_max(a, 7.0))))"
CLAMPED = f"mul({_GATE}, add(clamp_max(clamp_min(b, -7.0), 7.0), 1.0))"
PHI = {
    "mul(silu(a), b)": lambda a, b: torch.nn.functional.silu(a) * b,
    "mul(gelu(a), b)": lambda a, b: torch.nn.functional.gelu(a) * b,
    "gelu_tanh(a)": lambda a, b: torch.nn.functional.gelu(a, approximate="tanh"),
    "mul(relu(a), relu(a))": lambda a, b: torch.relu(a) ** 2,
    CLAMPED: lambda a, b: a.clamp(max=7) * torch.sigmoid(1.702 * a.clamp(max=7)) * (b.clamp(-7, 7) + 1),
    "mul(softplus(a), tanh(b))": lambda a, b: torch.nn.functional.softplus(a) * torch.tanh(b),
}


def halves(rows, gate):
    if gate == "none":
        return rows, None
    if gate == "interleaved":
        return rows[0::2], rows[1::2]
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def make_params(spec: ExpertsSpec, H, F, E, seed=0, dtype=None, O=None):
    """Parameters in the order of the spec's groups; inner strides 1, row strides wider than the rows."""
    g = torch.Generator().manual_seed(seed)
    biases = dtype or DTYPES[spec.stored("bias_out")]
    dtype = dtype or DTYPES[spec.dtype]
    widths = {"ab": F * (1 if spec.gate == "none" else 2), "a": F, "b": F}

    def matrix(rows, cols, layout):
        shape = (rows, cols) if layout == "nk" else (cols, rows)
        wide = torch.randn(E, shape[0], shape[1] + 3, generator=g) * cols**-0.5
        return wide.to(dtype)[:, :, : shape[1]]

    made = []
    for group in spec.param_groups:
        if group == "out":
            tensor = matrix(O or H, F, spec.layout_out)
        elif group == "bias_out":
            tensor = torch.randn(E, O or H, generator=g).to(biases)
        elif group.startswith("bias_"):
            tensor = torch.randn(E, widths[group[5:]], generator=g).to(biases)
        else:
            tensor = matrix(widths[group], H, spec.layout_in)
        made += [tensor] if spec.stacked else list(tensor.unbind(0))
    return made


def layer(x, weights, experts, params, spec: KernelSpec):
    """y[T, O] in float64, differentiable."""
    s = spec.experts
    count = 1 if s.stacked else len(params) // len(s.param_groups)
    groups = {g: params[i] if s.stacked else params[i * count : (i + 1) * count] for i, g in enumerate(s.param_groups)}
    E = len(groups[s.param_groups[0]])
    wide = widths(s, params)[2]
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(wide, dtype=torch.float64)
        for slot in range(experts.shape[1]):
            e = int(experts[t, slot])
            if not 0 <= e < E:
                continue
            p = {g: v[e].double() for g, v in groups.items()}
            w, row = weights[t, slot].double(), x[t].double()
            row = row * w if s.weight_on == "input" else row
            if s.gate == "separate":
                a, b, bias_a, bias_b = p["a"], p["b"], p.get("bias_a"), p.get("bias_b")
                a, b = (a, b) if s.layout_in == "nk" else (a.t(), b.t())
            else:
                a, b = halves(p["ab"] if s.layout_in == "nk" else p["ab"].t(), s.gate)
                bias_a, bias_b = halves(p["bias_ab"], s.gate) if s.bias_in else (None, None)
            va = a @ row if bias_a is None else a @ row + bias_a
            vb = None if b is None else (b @ row if bias_b is None else b @ row + bias_b)
            h = PHI[s.activation](va, vb)
            out = ((p["out"] if s.layout_out == "nk" else p["out"].t()) @ h) if s.out else h
            out = out + p["bias_out"] if s.bias_out else out
            y = y + (out if s.weight_on == "input" else out * w)
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros(0, wide, dtype=torch.float64)


def routing(kind, T, E, k, seed=0):
    """weights[T, k], experts[T, k]: random, all tokens to the same experts, or with idle experts and sentinels."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(T, k, generator=g)
    if kind == "same":
        return weights, torch.arange(k).expand(T, k).clone()
    experts = torch.rand(T, E, generator=g).topk(k).indices
    if kind == "sentinels":
        experts[::2, 0] = E
        experts[1::3, -1] = -1
        weights[::2, 0] = float("nan")
    return weights, experts


def relative(a, b):
    """‖a − b‖ / ‖b‖."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def weight_terms(grad, x, weights, experts, params, spec: KernelSpec):
    """Σ|terms| of every slot's weight's gradient in float64, [T, k]: Σ|x · its gradient| or Σ|grad · y|.

    The terms may cancel, so that rounding leaves any relative error; a sum's error is a part of this (Higham, Accuracy
    and Stability of Numerical Algorithms, §4.2).
    """
    k = experts.shape[1]
    rows, grads = (t.double().repeat_interleave(k, 0) for t in (x, grad))
    each, one = experts.reshape(-1, 1), torch.ones(experts.numel(), 1, dtype=torch.float64)
    wide = [p.double() for p in params]
    if spec.experts.weight_on == "input":
        rows = rows * weights.double().reshape(-1, 1)
        needs = [True] + [False] * (1 + len(params))
        terms = x.double().repeat_interleave(k, 0) * twin.experts_backward(grads, rows, one, each, wide, spec, needs)[0]
    else:
        terms = grads * twin.experts(rows, one, each, wide, spec).double()
    return terms.abs().sum(1).view(experts.shape)
