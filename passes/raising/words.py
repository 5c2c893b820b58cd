"""How each kind of FX node is said in canonical words: pointwise functions, casts, reductions, creation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import fx

from moec.ir.dtypes import GRAPH_NAMES
from moec.ir.expr import POINTWISE
from moec.ir.graph import Arg, Ref
from moec.passes.raising.raise_graph import ANY, Builder, fake, opaque, type_of_fake


def key_of(node: fx.Node) -> str:
    """The name that all spellings of one operation share: torch.softmax, x.softmax and F.softmax are `softmax`."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        target = target._overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        space, _, name = target._qualified_op_name.partition("::")
        return name if space == "aten" else f"{space}.{name}"
    name = getattr(target, "__name__", str(target))
    if isinstance(target, FunctionType) and not is_torchs(target):
        return f"{target.__module__}.{name}"  # a user's function may be called `softmax` and be something else
    return RENAMED.get(name, name)


def is_torchs(function: FunctionType) -> bool:
    """Whether a function is torch's own, and not of a package whose name begins like torch's."""
    return (function.__module__ or "").partition(".")[0] == "torch"


RENAMED: Mapping[str, str] = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "floordiv": "floor_divide",
    "negative": "neg",
    "_softmax": "softmax",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "inv": "invert",
    "invert": "invert",
    "bitwise_not": "invert",
    "itruediv": "div_",
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "ifloordiv": "floor_divide_",
    "imod": "remainder_",
    "ipow": "pow_",
    "imatmul": "matmul",
    "iand": "bitwise_and_",
    "ior": "bitwise_or_",
    "ixor": "bitwise_xor_",
    "ilshift": "lshift_",
    "irshift": "rshift_",
    "expit": "sigmoid",
    "clip": "clamp",
    "greater": "gt",
    "less": "lt",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "concat": "cat",
    "concatenate": "cat",
}

UNARY = frozenset(name for name, fn in POINTWISE.items() if fn.arity == 1) | {
    "rsqrt",
    "invert",
    "log2",
    "expm1",
    "round",
}
BINARY = frozenset(
    {"add", "sub", "mul", "div", "maximum", "minimum", "pow", "floor_divide", "remainder", "mod"}
    | {"eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "logical_and", "logical_or"}
)


def named(node: fx.Node, names: str) -> dict[str, Any]:
    """The node's arguments by name, positional ones in the order given; absent ones are missing."""
    keywords = {NUMPY_NAMES.get(name, name): value for name, value in node.kwargs.items()}
    return dict(zip(names.split(), node.args, strict=False)) | keywords


NUMPY_NAMES: Mapping[str, str] = {"axis": "dim", "keepdims": "keepdim"}
"""Keywords that torch takes in NumPy's spelling too."""


def raise_unary(build: Builder, node: fx.Node) -> Arg | None:
    """f(x), f one of UNARY."""
    key = key_of(node).rstrip("_")
    args = named(node, "input approximate")
    if key == "gelu" and args.get("approximate") == "tanh":
        key = "gelu_tanh"
    if (key == "softplus" and set(args) != {"input"}) or set(args) - {"input", "approximate", "inplace"}:
        return None
    return build.emit(key, (build.value(args["input"]),), type_of_fake(fake(node)))


_ROUNDED = {"floor": "floor_divide", "trunc": "truncate_divide"}


def raise_binary(build: Builder, node: fx.Node) -> Arg | None:
    """f(x, y), one of them may be a number. `alpha` and `rounding_mode` become words of their own. 0 + x is x."""
    key = key_of(node).rstrip("_")
    args = named(node, "input other")
    if len(node.args) > 2 or set(args) - {"input", "other", "alpha", "rounding_mode"}:
        return None
    x, y = build.value(args["input"]), build.value(args["other"])
    rounding = args.get("rounding_mode")
    if rounding is not None:
        if rounding not in _ROUNDED:
            return None
        key = _ROUNDED[rounding]
    result = type_of_fake(fake(node))
    if args.get("alpha", 1) != 1:
        y = build.emit("mul", (y, build.value(args["alpha"])), build.type_of(y))
    if key == "add" and type(x) is int and x == 0 and build.type_of(y) == result:  # a sum in Python begins with 0
        return y
    return build.emit(key, (x, y), result)


def raise_logical_not(build: Builder, node: fx.Node) -> Arg | None:
    """logical_not(mask) → invert; of numbers, whether they are 0."""
    x, to = build.value(node.args[0]), type_of_fake(fake(node))
    dtype = build.type_of(x).dtype
    if dtype == "any":
        return None
    return build.emit("invert", (x,), to) if dtype == "bool" else build.emit("eq", (x, 0), to)


def raise_clamp(build: Builder, node: fx.Node) -> Arg | None:
    """clamp(x, min, max) → clamp_max(clamp_min(x, min), max), which is torch's order."""
    args = named(
        node, {"clamp_min": "input min", "clamp_max": "input max"}.get(key_of(node).rstrip("_"), "input min max")
    )
    value = build.value(args["input"])
    result = type_of_fake(fake(node))
    for name in ("min", "max"):
        if args.get(name) is not None:
            value = build.emit(f"clamp_{name}", (value, build.value(args[name])), result)
    return value


def cast(build: Builder, value: Arg, dtype: str) -> Arg:
    """`value` in `dtype`; itself when it already is."""
    kind = build.type_of(value)
    if kind.dtype == dtype:
        return value
    return build.emit("cast", (value,), replace(kind, dtype=dtype), dtype=dtype)


def raise_cast(build: Builder, node: fx.Node) -> Arg | None:
    """Every way to say 'in another dtype': to, type, float, type_as, …; nothing when dtype and device stay."""
    source, result = node.args[0], fake(node)
    before = fake(source) if isinstance(source, fx.Node) else None
    if not isinstance(before, torch.Tensor) or not isinstance(result, torch.Tensor) or before.device != result.device:
        return None
    return cast(build, build.value(source), GRAPH_NAMES.get(result.dtype, str(result.dtype)))


def raise_same(build: Builder, node: fx.Node) -> Arg | None:
    """clone, contiguous: the same value."""
    return build.value(node.args[0])


def raise_detach(build: Builder, node: fx.Node) -> Arg | None:
    """detach(x): the same value where nothing asks for its gradient."""
    source = fake(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if isinstance(source, torch.Tensor) and not source.requires_grad:
        return build.value(node.args[0])
    return build.emit("detach", (build.value(node.args[0]),), type_of_fake(fake(node)))


def raise_softmax(build: Builder, node: fx.Node) -> Arg | None:
    """softmax(x, dim, dtype) → softmax(cast(x))."""
    values = (*node.args[1:], *node.kwargs.values())
    if set(node.kwargs) - {"dim", "dtype", "_stacklevel", "half_to_float"}:
        return None
    dims = [node.kwargs["dim"]] if "dim" in node.kwargs else [a for a in node.args[1:2] if isinstance(a, int)]
    if not dims or not isinstance(dims[0], int):
        return None
    x = build.value(node.args[0])
    result = type_of_fake(fake(node))
    if any(isinstance(v, torch.dtype) for v in values):
        x = cast(build, x, result.dtype)
    return build.emit("softmax", (x,), result, dim=dims[0] % max(result.rank, 1))


def raise_reduce(build: Builder, node: fx.Node) -> Arg | None:
    """sum, amax, amin, mean, any, all over axes → reduce_… with sorted non-negative dims."""
    args = named(node, "input dim keepdim")
    x = build.value(args["input"])
    source, result = build.type_of(x), type_of_fake(fake(node))
    if not isinstance(x, Ref) or result is ANY or set(args) - {"input", "dim", "keepdim", "dtype"}:
        return None
    dims = args.get("dim")
    if isinstance(dims, int):
        dims = (dims,)
    axes = tuple(range(source.rank)) if not dims else tuple(sorted(d % source.rank for d in dims))
    if "dtype" in args and args["dtype"] is not None:
        x = cast(build, x, result.dtype)
    return build.emit(f"reduce_{key_of(node)}", (x,), result, dims=axes, keepdim=bool(args.get("keepdim", False)))


def raise_max(build: Builder, node: fx.Node) -> Arg | None:
    """max(x, dim) → its values and the indices of topk 1; max(x, y) → maximum."""
    args = named(node, "input dim keepdim")
    if isinstance(args.get("dim"), fx.Node) or "other" in args:
        other = args.get("other", args.get("dim"))
        return build.emit("maximum", (build.value(args["input"]), build.value(other)), type_of_fake(fake(node)))
    value = fake(node)
    if not isinstance(value, (tuple, list)):
        return None
    types = tuple(map(type_of_fake, value))
    x = build.value(args["input"])
    dim = args["dim"] % build.type_of(x).rank
    return build.emit_many("max", (x,), types, dim=dim, keepdim=bool(args.get("keepdim", False)))


def raise_argmax(build: Builder, node: fx.Node) -> Arg | None:
    """argmax(x, dim): the indices of max along an axis."""
    args = named(node, "input dim keepdim")
    x = build.value(args["input"])
    if not isinstance(args.get("dim"), int) or not isinstance(x, Ref):
        return None
    dim = args["dim"] % max(build.type_of(x).rank, 1)
    return build.emit("argmax", (x,), type_of_fake(fake(node)), dim=dim, keepdim=bool(args.get("keepdim", False)))


def raise_topk(build: Builder, node: fx.Node) -> Arg | None:
    """topk(x, k, dim) → values, indices; k as the text of its expression where it is symbolic."""
    args = named(node, "input k dim largest sorted")
    k = build.value(args.get("k"))
    if not isinstance(k, int | str):
        return None
    x = build.value(args["input"])
    attrs: dict[str, int | str] = {"k": k, "dim": args.get("dim", -1) % build.type_of(x).rank}
    flags = {name: bool(args.get(name, True)) for name in ("largest", "sorted")}
    return build.emit_many("topk", (x,), tuple(map(type_of_fake, fake(node))), **attrs, **flags)


def raise_unique(build: Builder, node: fx.Node) -> Arg | None:
    """unique(x): each number that occurs in x, once."""
    args = named(node, "input sorted return_inverse return_counts dim")
    if args.get("return_inverse") or args.get("return_counts") or args.get("dim") is not None:
        return None
    return build.emit("unique", (build.value(args["input"]),), type_of_fake(fake(node)))


def raise_sort(build: Builder, node: fx.Node) -> Arg | None:
    """sort(x, dim, descending) → values, indices; argsort is its second result."""
    args = named(node, "input dim descending")
    x = build.value(args["input"])
    kind = build.type_of(x)
    dim = args.get("dim", -1)
    if not isinstance(dim, int):
        return None
    index = replace(kind, dtype="i64")
    attrs = {"dim": dim % max(kind.rank, 1), "descending": bool(args.get("descending", False))}
    results = build.emit_many("sort", (x,), (kind, index), **attrs, stable=bool(args.get("stable", False)))
    return results[1] if key_of(node) == "argsort" else results


def raise_full(build: Builder, node: fx.Node) -> Arg | None:
    """zeros, ones, full, *_like, new_* → full(value); torch.empty is a full of unknown value."""
    key = key_of(node)
    stem = key.removesuffix("_like").removeprefix("new_")
    value: Any = {"zeros": 0.0, "ones": 1.0, "empty": None}.get(stem)
    if stem == "full":
        fill: Any = named(node, "input size fill_value" if key == "new_full" else "input fill_value").get("fill_value")
        if isinstance(fill, fx.Node) and isinstance(size := build.value(fill), str):
            value = size  # the text of a size
        elif isinstance(fill, (int, float)):
            value = float(fill)
        else:  # a tensor's item is a value, not a constant
            return None
    return build.emit("full", (), type_of_fake(fake(node)), value=value)


def raise_arange(build: Builder, node: fx.Node) -> Arg | None:
    """arange(n) from 0 in steps of 1 → arange; the length is in its type."""
    limits = [a for a in node.args if not isinstance(a, torch.dtype)] + [
        node.kwargs[k] for k in ("start", "end") if k in node.kwargs
    ]
    if (len(limits) > 1 and limits[0] != 0) or len(limits) > 2 or "step" in node.kwargs:
        return None
    return build.emit("arange", (), type_of_fake(fake(node)))


def raise_searchsorted(build: Builder, node: fx.Node) -> Arg | None:
    """searchsorted(sorted, x, right): how many of the sorted numbers are less than x (or, `right`, not more)."""
    args = named(node, "sorted input out_int32 right side sorter")
    if "sorted" not in args or args.get("sorter") is not None:
        return None
    right = bool(args.get("right")) or args.get("side") == "right"
    operands = (build.value(args["sorted"]), build.value(args["input"]))
    return build.emit("searchsorted", operands, type_of_fake(fake(node)), right=right)


def raise_cumsum(build: Builder, node: fx.Node) -> Arg | None:
    """cumsum(x, dim)."""
    x = build.value(node.args[0])
    dim = named(node, "input dim").get("dim")
    if not isinstance(dim, int):
        return None
    return build.emit("cumsum", (x,), type_of_fake(fake(node)), dim=dim % max(build.type_of(x).rank, 1))


def raise_counts(build: Builder, node: fx.Node) -> Arg | None:
    """bincount(ids, minlength) and histc(ids, E, 0, E − 1) → counts(ids): how often each of E ids occurs.

    histc(ids, E, 0, E) counts an id E with those of E − 1: it is read where no id can be E.
    """
    if key_of(node) == "bincount":
        args = named(node, "input weights minlength")
        least = args.get("minlength", 0)
        if args.get("weights") is not None or not isinstance(least, int):
            return None
        return build.emit("counts", (build.value(args["input"]),), type_of_fake(fake(node)), bins=least)
    args = named(node, "input bins min max")
    bins = args.get("bins", 100)
    whole = args.get("max") == bins - 1 or (args.get("max") == bins and _below(args["input"], bins))
    if args.get("min") != 0 or not whole:
        return None
    return build.emit("counts", (build.value(args["input"]),), type_of_fake(fake(node)), bins=bins)


_KEEPING = frozenset({"reshape", "view", "flatten", "to", "float", "long", "int", "detach", "contiguous", "clone"})


def _below(node: Any, bins: int) -> bool:
    """Whether a tensor holds what a top-k or a maximum over `bins` places chose, at most viewed and cast."""
    while isinstance(node, fx.Node) and key_of(node) in _KEEPING:
        node = node.args[0]
    source = node.args[0] if isinstance(node, fx.Node) and node.args else None
    if not isinstance(source, fx.Node):
        return False
    picked = key_of(node) == "getitem" and node.args[1] == 1 and key_of(source) in ("topk", "max")
    chosen = node if key_of(node) == "argmax" else source if picked else None
    if chosen is None:
        return False
    names = {"topk": "input k dim", "max": "input dim", "argmax": "input dim"}[key_of(chosen)]
    args = named(chosen, names)
    scores, dim = fake(args["input"]), args.get("dim", -1 if key_of(chosen) == "topk" else None)
    return isinstance(dim, int) and bool(scores.shape[dim] == bins)


def raise_masked_fill(build: Builder, node: fx.Node) -> Arg | None:
    """masked_fill(x, mask, value)."""
    args = named(node, "input mask value")
    operands = tuple(build.value(args[name]) for name in ("input", "mask", "value"))
    return build.emit("masked_fill", operands, type_of_fake(fake(node)))


def raise_size(build: Builder, node: fx.Node) -> Arg | None:
    """x.size(), x.shape, x.numel(): sizes are in types, not values."""
    return build.emit("size", (), ANY)


def raise_effect(build: Builder, node: fx.Node) -> Arg | None:
    """A change of torch's own state: grad mode, autocast."""
    return opaque(build, node, "effect")


def raise_assert(build: Builder, node: fx.Node) -> Arg | None:
    """A check that Dynamo left; it lives as long as what it checks."""
    return opaque(build, node, "assert")


def raise_dropout(build: Builder, node: fx.Node) -> Arg | None:
    """Dropout that is switched off, or of probability 0, is what it is given and asks for no random number."""
    args = named(node, "input p training inplace")
    train = args.get("training", args.get("train", True))
    if train is False or args.get("p", 0.5) == 0:
        return build.value(args["input"])
    return raise_random(build, node)


def raise_random(build: Builder, node: fx.Node) -> Arg | None:
    """Consumes random numbers, so it stays even when unused."""
    return opaque(build, node, "random")
