"""Activations that torch has an operator of its own for, said in simpler words."""

from __future__ import annotations

import sympy
from torch import fx

from moec.ir.graph import Arg, Type
from moec.passes.raising.raise_graph import Builder, fake, type_of_fake
from moec.passes.raising.word_views import slice_dim
from moec.passes.raising.words import named


def raise_square(build: Builder, node: fx.Node) -> Arg | None:
    """square(x) → mul(x, x)."""
    x = build.value(node.args[0])
    return build.emit("mul", (x, x), type_of_fake(fake(node)))


def raise_mish(build: Builder, node: fx.Node) -> Arg | None:
    """mish(x) → mul(x, tanh(softplus(x)))."""
    x, kind = build.value(node.args[0]), type_of_fake(fake(node))
    return build.emit("mul", (x, build.emit("tanh", (build.emit("softplus", (x,), kind),), kind)), kind)


def raise_hardswish(build: Builder, node: fx.Node) -> Arg | None:
    """hardswish(x) → x · clamp(x + 3, 0, 6) / 6."""
    x, kind = build.value(node.args[0]), type_of_fake(fake(node))
    inner = build.emit("clamp_min", (build.emit("add", (x, 3.0), kind), 0.0), kind)
    return build.emit("div", (build.emit("mul", (x, build.emit("clamp_max", (inner, 6.0), kind)), kind), 6.0), kind)


def raise_relu6(build: Builder, node: fx.Node) -> Arg | None:
    """relu6(x) → clamp(x, 0, 6)."""
    x, kind = build.value(node.args[0]), type_of_fake(fake(node))
    return build.emit("clamp_max", (build.emit("clamp_min", (x, 0.0), kind), 6.0), kind)


def raise_leaky_relu(build: Builder, node: fx.Node) -> Arg | None:
    """leaky_relu(x, s) → max(x, s·x), for 0 ≤ s ≤ 1."""
    slope = named(node, "input negative_slope").get("negative_slope", 0.01)
    if not isinstance(slope, float) or not 0 <= slope <= 1:
        return None
    x, kind = build.value(node.args[0]), type_of_fake(fake(node))
    return build.emit("maximum", (x, build.emit("mul", (x, slope), kind)), kind)


def raise_glu(build: Builder, node: fx.Node) -> Arg | None:
    """glu(x, dim) → a · sigmoid(b), the two halves of x."""
    args = named(node, "input dim")
    x, kind = build.value(args["input"]), type_of_fake(fake(node))
    dim = args.get("dim", -1) % kind.rank
    size = kind.shape[dim]
    if not size.is_Integer:
        return None
    a, b = slice_dim(build, x, dim, 0, int(size)), slice_dim(build, x, dim, int(size), 2 * int(size))
    if a is None or b is None:
        return None
    return build.emit("mul", (a, build.emit("sigmoid", (b,), kind)), kind)


def raise_normalize(build: Builder, node: fx.Node) -> Arg | None:
    """normalize(x, p, dim) → x / max(Σ|x|, ε) or x / max(√Σx², ε)."""
    args = named(node, "input p dim eps")
    p, x, kind = args.get("p", 2.0), build.value(args["input"]), type_of_fake(fake(node))
    dim = args.get("dim", 1)
    if p not in (1, 2) or not isinstance(dim, int) or kind.rank == 0:
        return None
    dim %= kind.rank
    norm = Type(kind.dtype, tuple(sympy.S.One if i == dim else d for i, d in enumerate(kind.shape)))
    parts = build.emit("abs", (x,), kind) if p == 1 else build.emit("mul", (x, x), kind)
    total = build.emit("reduce_sum", (parts,), norm, dims=(dim,), keepdim=True)
    if p == 2:
        total = build.emit("sqrt", (total,), norm)
    return build.emit("div", (x, build.emit("clamp_min", (total, float(args.get("eps", 1e-12))), norm)), kind)
