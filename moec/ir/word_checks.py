"""What the well-known words demand of the types of their operands and results.

Each check gets an instruction and the types of all values before it, and returns what is wrong, or '' for nothing.
Only what can be decided is refused: sizes `s0` and `s1` may be equal, `s0` and `s0 + 1` may not.
Words without a check, and operands without a type (numbers, `any`), are accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import sympy

from moec.ir.dims import Dim, dim_text
from moec.ir.expr import POINTWISE
from moec.ir.graph import Arg, Instr, Ref, Type

Types = Mapping[str, Type]
Check = Callable[[Instr, Types], str]

_ONE = sympy.Integer(1)


def differ(a: Dim, b: Dim) -> bool:
    """Whether two sizes are different whatever their symbols are."""
    return a is not b and a != b and _never_equal(a, b)  # the first two decide nearly always, and are fast


@lru_cache(maxsize=65536)
def _never_equal(a: Dim, b: Dim) -> bool:
    gap: Any = sympy.expand(a - b)
    return gap.is_zero is False


def check_word(instr: Instr, types: Types) -> str:
    """What is wrong with the instruction, or ''."""
    check = CHECKS.get(instr.word)
    return check(instr, types) if check is not None else ""


def _tensor(arg: Arg, types: Types) -> Type | None:
    if not isinstance(arg, Ref):
        return None
    kind = types[arg.name]
    return None if kind.dtype == "any" else kind


def _first(instr: Instr, types: Types) -> tuple[Type, Type] | None:
    """The first operand's and the first result's type, where both are tensors."""
    source = _tensor(instr.args[0], types) if instr.args else None
    result = instr.types[0] if instr.types else None
    return None if source is None or result is None or result.dtype == "any" else (source, result)


def _attr(instr: Instr, name: str) -> Any:
    """An attribute, or None."""
    for key, value in instr.attrs:
        if key == name:
            return value
    return None


def _shape(shape: Iterable[Dim]) -> str:
    return f"[{', '.join(map(dim_text, shape))}]"


def _expect_shape(result: Type, shape: Sequence[Dim]) -> str:
    if len(result.shape) != len(shape) or any(map(differ, result.shape, shape)):
        return f"its result is {result}, expected the shape {_shape(shape)}"
    return ""


def _expect_dtype(result: Type, dtype: str) -> str:
    return "" if result.dtype == dtype else f"its result is {result}, expected the dtype {dtype}"


def _axis(instr: Instr, source: Type) -> tuple[int, str]:
    """The `dim` attribute as an index from 0 (-1: there is none to check), or what is wrong with it."""
    dim = _attr(instr, "dim")
    if not isinstance(dim, int) or isinstance(dim, bool) or (not source.rank and dim in (0, -1)):
        return -1, ""
    if not -source.rank <= dim < source.rank:
        return -1, f"dim={dim} is not an axis of its operand {source}"
    return dim % source.rank, ""


def _pointwise(instr: Instr, types: Types) -> str:
    arity = POINTWISE[instr.word].arity
    if len(instr.args) != arity:
        return f"it takes {arity} operands, got {len(instr.args)}"
    result = instr.types[0] if instr.types else None
    if result is None or result.dtype == "any":
        return ""
    for arg in instr.args:
        kind = _tensor(arg, types)
        if kind is None or kind.shape == result.shape:
            continue
        pairs = zip(reversed(kind.shape), reversed(result.shape), strict=False)
        if kind.rank > result.rank or any(differ(d, r) and differ(d, _ONE) for d, r in pairs):
            return f"its operand {_named(arg)}: {kind} does not broadcast to its result {result}"
    return ""


def _named(arg: Arg) -> str:
    return str(arg) if isinstance(arg, Ref) else repr(arg)


@lru_cache(maxsize=1024)
def _equation(eq: str) -> tuple[tuple[str, ...], str] | None:
    """The operands' and the result's letters; None when the text is no equation."""
    left, arrow, right = eq.partition("->")
    return (tuple(left.split(",")), right) if arrow and "->" not in right else None


def _contract(instr: Instr, types: Types) -> str:
    eq = _attr(instr, "eq")
    parsed = _equation(eq) if isinstance(eq, str) else None
    if parsed is None:
        return f"its equation is {eq!r}, expected one such as 'ab,cb->ac'"
    inputs, right = parsed
    if len(inputs) != len(instr.args):
        return f"its equation {eq!r} has {len(inputs)} operands, got {len(instr.args)}"
    sizes: dict[str, Dim] = {}
    for letters, arg in zip(inputs, instr.args, strict=True):
        kind = _tensor(arg, types)
        if kind is None:
            return ""
        if len(kind.shape) != len(letters):
            return f"its operand {_named(arg)}: {kind} has {kind.rank} axes, {letters!r} in {eq!r} says {len(letters)}"
        for letter, dim in zip(letters, kind.shape, strict=True):
            known = sizes.setdefault(letter, dim)
            if known is dim:
                continue
            if differ(known, dim) and differ(known, _ONE) and differ(dim, _ONE):
                return f"axis {letter!r} of {eq!r} is {dim_text(known)} and {dim_text(dim)} (in {_named(arg)}: {kind})"
            sizes[letter] = dim if known == _ONE else known
    if any(letter not in sizes for letter in right):
        return f"the result of {eq!r} has axes that no operand has"
    return _expect_shape(instr.types[0], [sizes[letter] for letter in right])


def _same_shape(instr: Instr, types: Types) -> str:
    found = _first(instr, types)
    return "" if found is None else _expect_shape(found[1], found[0].shape)


def _along(instr: Instr, types: Types) -> str:
    """Same shape, along an axis that exists: softmax, cumsum."""
    found = _first(instr, types)
    return "" if found is None else _axis(instr, found[0])[1] or _expect_shape(found[1], found[0].shape)


def _updated(instr: Instr, types: Types) -> str:
    """A new value of the first operand: index_add, index_put, scatter, …"""
    found = _first(instr, types)
    if found is None:
        return ""
    wrong = _axis(instr, found[0])[1] or _expect_shape(found[1], found[0].shape)
    return wrong or _expect_dtype(found[1], found[0].dtype)


def _cast(instr: Instr, types: Types) -> str:
    dtype = _attr(instr, "dtype")
    wrong = _expect_dtype(instr.types[0], dtype) if isinstance(dtype, str) else ""
    return wrong or _same_shape(instr, types)


def _two(instr: Instr, types: Types) -> str:
    """topk and sort: values and i64 indices of one shape."""
    if len(instr.types) != 2:
        return f"it has {len(instr.types)} results, expected values and indices"
    found = _first(instr, types)
    if found is None:
        return ""
    source, values = found
    axis, wrong = _axis(instr, source)
    k = _attr(instr, "k") if instr.word == "topk" else None
    if wrong or (axis < 0 and source.rank):
        return wrong
    if isinstance(k, int) and axis >= 0 and source.shape[axis].is_Integer and k > int(source.shape[axis]):
        return f"k={k} is more than the {source.shape[axis]} entries along dim={axis} of {source}"
    shape = list(source.shape)
    if k is not None and axis >= 0:
        shape[axis] = sympy.Integer(k) if isinstance(k, int) else values.shape[axis]
    wrong = _expect_shape(values, shape) or _expect_dtype(values, source.dtype)
    return wrong or _expect_shape(instr.types[1], shape) or _expect_dtype(instr.types[1], "i64")


def _reduce(instr: Instr, types: Types) -> str:
    found, dims = _first(instr, types), _attr(instr, "dims")
    if found is None or not isinstance(dims, tuple):
        return ""
    source, result = found
    if any(not isinstance(d, int) or not -source.rank <= d < source.rank for d in dims):
        return f"dims={list(dims)} are not axes of its operand {source}"
    axes = {d % source.rank for d in dims}
    kept = [_ONE if i in axes else d for i, d in enumerate(source.shape)]
    keepdim = bool(_attr(instr, "keepdim"))
    return _expect_shape(result, kept if keepdim else [d for i, d in enumerate(source.shape) if i not in axes])


def _permute(instr: Instr, types: Types) -> str:
    found, dims = _first(instr, types), _attr(instr, "dims")
    if found is None or not isinstance(dims, tuple):
        return ""
    if sorted(dims) != list(range(found[0].rank)):
        return f"dims={list(dims)} is no order of the {found[0].rank} axes of {found[0]}"
    return _expect_shape(found[1], [found[0].shape[int(d)] for d in dims])


def _reshape(instr: Instr, types: Types) -> str:
    found = _first(instr, types)
    if found is None:
        return ""
    source, result = found
    if source.shape != result.shape and differ(sympy.Mul(*source.shape), sympy.Mul(*result.shape)):
        return f"{source} has not as many elements as its result {result}"
    return _expect_dtype(result, source.dtype)


def _expand(instr: Instr, types: Types) -> str:
    found = _first(instr, types)
    if found is None:
        return ""
    source, result = found
    pairs = zip(reversed(source.shape), reversed(result.shape), strict=False)
    if source.rank > result.rank or any(differ(s, r) and differ(s, _ONE) for s, r in pairs):
        return f"{source} does not expand to its result {result}"
    return _expect_dtype(result, source.dtype)


def _slice(instr: Instr, types: Types) -> str:
    found = _first(instr, types)
    if found is None:
        return ""
    source, result = found
    axis, wrong = _axis(instr, source)
    if wrong or axis < 0:
        return wrong
    bounds = [_attr(instr, name) for name in ("start", "stop", "step")]
    shape = list(source.shape)
    if all(isinstance(b, int) for b in bounds) and shape[axis].is_Integer:
        shape[axis] = sympy.Integer(len(range(*slice(*bounds).indices(int(shape[axis])))))
    elif result.rank == source.rank:
        shape[axis] = result.shape[axis]
    return _expect_shape(result, shape) or _expect_dtype(result, source.dtype)


def _cat(instr: Instr, types: Types) -> str:
    parts = [_tensor(a, types) for a in instr.args[0]] if instr.args and isinstance(instr.args[0], tuple) else []
    kinds = [kind for kind in parts if kind is not None]
    if not kinds or len(kinds) != len(parts) or any(k.rank != kinds[0].rank for k in kinds) or not kinds[0].rank:
        return ""
    axis, wrong = _axis(instr, kinds[0])
    if wrong or axis < 0:
        return wrong
    total: Any = sympy.Add(*(k.shape[axis] for k in kinds))
    for kind in kinds:
        wrong = _expect_shape(instr.types[0], [total if i == axis else d for i, d in enumerate(kind.shape)])
        if wrong:
            return wrong
    return ""


def _gather(instr: Instr, types: Types) -> str:
    found = _first(instr, types)
    index = _tensor(instr.args[1], types) if len(instr.args) > 1 else None
    if found is None or index is None:
        return ""
    source, result = found
    if source.rank != index.rank:
        return f"its index {index} has another number of axes than its operand {source}"
    return _axis(instr, source)[1] or _expect_shape(result, index.shape) or _expect_dtype(result, source.dtype)


def _index(instr: Instr, types: Types) -> str:
    found = _first(instr, types)
    indices = [_tensor(arg, types) for arg in instr.args[1:]]
    known = [index for index in indices if index is not None and index.dtype != "bool"]
    if found is None or not known or len(known) != len(indices):
        return ""
    source, result = found
    axis, wrong = _axis(instr, source)
    if wrong or axis < 0:
        return wrong
    if axis + len(known) > source.rank:
        return f"{len(known)} indices from dim={axis} are more than the axes of {source}"
    lead = max((index.shape for index in known), key=len)
    if any(index.shape != lead for index in known):
        return _expect_dtype(result, source.dtype)
    shape = [*source.shape[:axis], *lead, *source.shape[axis + len(known) :]]
    return _expect_shape(result, shape) or _expect_dtype(result, source.dtype)


def _one_hot(instr: Instr, types: Types) -> str:
    found, classes = _first(instr, types), _attr(instr, "classes")
    if found is None or not isinstance(classes, int):
        return ""
    return _expect_shape(found[1], [*found[0].shape, sympy.Integer(classes)])


def _grouped(instr: Instr, types: Types) -> str:
    kinds = [_tensor(arg, types) for arg in instr.args[:2]]
    if len(kinds) != 2 or kinds[0] is None or kinds[1] is None:
        return ""
    rows, weights = kinds[0], kinds[1]
    if rows.rank != 2 or weights.rank != 3:
        return f"its operands are {rows} and {weights}, expected rows [S, K] and weights [E, K, N]"
    if differ(rows.shape[1], weights.shape[1]):
        return f"the rows {rows} and the weights {weights} do not agree in K"
    return _expect_shape(instr.types[0], [rows.shape[0], weights.shape[2]])


def _vector(instr: Instr, types: Types) -> str:
    wrong = (kind for kind in instr.types if kind.dtype != "any" and kind.rank != 1)
    return next((f"its result is {kind}, expected one axis" for kind in wrong), "")


CHECKS: Mapping[str, Check] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    "contract": _contract,
    "grouped": _grouped,
    "softmax": _along,
    "cumsum": _along,
    "topk": _two,
    "sort": _two,
    "reduce_sum": _reduce,
    "reduce_mean": _reduce,
    "reduce_amax": _reduce,
    "reduce_amin": _reduce,
    "reduce_any": _reduce,
    "reduce_all": _reduce,
    "reduce_prod": _reduce,
    "index": _index,
    "gather": _gather,
    "scatter": _updated,
    "scatter_add": _updated,
    "index_add": _updated,
    "index_copy": _updated,
    "index_put": _updated,
    "one_hot": _one_hot,
    "where_indices": _vector,
    "arange": _vector,
    "counts": _vector,
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
    "expand": _expand,
    "cat": _cat,
    "cast": _cast,
    "detach": _same_shape,
}
