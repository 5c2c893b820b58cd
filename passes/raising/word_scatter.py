"""How gathers and scatters along an axis are said: gather, scatter, scatter_add, index_add, index_copy, index_put."""

from __future__ import annotations

from torch import fx

from moec.ir.graph import Arg, Type
from moec.passes.raising.raise_graph import Builder, fake, type_of_fake
from moec.passes.raising.words import key_of, named


def raise_gather(build: Builder, node: fx.Node) -> Arg | None:
    """gather(x, dim, i) and take_along_dim(x, i, dim) → gather."""
    args = named(node, "input dim index" if key_of(node) == "gather" else "input indices dim")
    value = build.value(args["input"])
    index = build.value(args.get("index", args.get("indices")))
    if not isinstance(args.get("dim"), int):
        return None
    dim = args["dim"] % build.type_of(value).rank
    if key_of(node) != "gather":  # take_along_dim broadcasts, gather does not
        kinds = [build.type_of(v) for v in (value, index)]
        if kinds[0].rank != kinds[1].rank:
            return None
        want = [max(pair, key=lambda d: d != 1) for pair in zip(*(k.shape for k in kinds), strict=True)]
        shapes = [(*want[:dim], k.shape[dim], *want[dim + 1 :]) for k in kinds]
        if any(
            d not in (1, w) for k, shape in zip(kinds, shapes, strict=True) for d, w in zip(k.shape, shape, strict=True)
        ):
            return None
        value, index = (
            v if k.shape == shape else build.emit("expand", (v,), Type(k.dtype, shape))
            for v, k, shape in zip((value, index), kinds, shapes, strict=True)
        )
    return build.emit("gather", (value, index), type_of_fake(fake(node)), dim=dim)


def raise_scatter(build: Builder, node: fx.Node) -> Arg | None:
    """scatter(x, dim, i, src or value) → scatter; scatter_add, index_add, index_copy by their own names.

    index_copy along the first axis is x[i] = src → index_put.
    """
    args = named(node, "input dim index src")
    value = build.value(args["input"])
    source = args.get("src", args.get("source", args.get("value", args.get("tensor"))))
    key = key_of(node).rstrip("_")
    if source is None or set(args) - {"input", "dim", "index", "src", "source", "value", "tensor", "alpha"}:
        return None
    if args.get("alpha", 1) != 1:
        return None
    index, source = build.value(args["index"]), build.value(source)
    kind, dim = type_of_fake(fake(node)), args["dim"] % build.type_of(value).rank
    if key == "index_copy" and dim == 0 and build.type_of(index).rank == 1:
        return build.emit("index_put", (value, source, index), kind, dim=0, accumulate=False)
    return build.emit(key, (value, index, source), kind, dim=dim)


def raise_scatter_reduce(build: Builder, node: fx.Node) -> Arg | None:
    """scatter_reduce(x, dim, i, src, 'sum') → scatter_add."""
    args = named(node, "input dim index src reduce include_self")
    if args.get("reduce") != "sum" or args.get("include_self", True) is not True or "src" not in args:
        return None
    value = build.value(args["input"])
    operands = (value, build.value(args["index"]), build.value(args["src"]))
    dim = args["dim"] % build.type_of(value).rank
    return build.emit("scatter_add", operands, type_of_fake(fake(node)), dim=dim)
