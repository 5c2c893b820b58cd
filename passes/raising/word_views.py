"""How views, gathers and scatters are said: reshape, permute, slice, expand, index, index_add, index_put."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from moec.ir.graph import Arg, Ref, Type
from moec.passes.raising.raise_graph import Builder, dim_of, fake, opaque, type_of_fake
from moec.passes.raising.word_first import first_rows
from moec.passes.raising.words import key_of, named


def reshape(build: Builder, value: Arg, to: Type) -> Arg:
    """`value` in another shape; itself when it has it already."""
    return value if build.type_of(value).shape == to.shape else build.emit("reshape", (value,), to)


def raise_reshape(build: Builder, node: fx.Node) -> Arg | None:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze, view_as → reshape; the new shape is in the type."""
    value, to = build.value(node.args[0]), type_of_fake(fake(node))
    if build.type_of(value).dtype != to.dtype:  # x.view(dtype) reads the same bits as other numbers
        return None
    return reshape(build, value, to)


def permute(build: Builder, value: Arg, dims: Sequence[int]) -> Arg:
    """`value` with its axes in another order; composes with a permute before it."""
    kind = build.type_of(value)
    order = tuple(d % kind.rank for d in dims)
    if order == tuple(range(kind.rank)):
        return value
    return build.emit("permute", (value,), Type(kind.dtype, tuple(kind.shape[d] for d in order)), dims=order)


def raise_permute(build: Builder, node: fx.Node) -> Arg | None:
    """permute(dims…), transpose(a, b), t(), T, mT → permute."""
    value = build.value(node.args[0])
    rank = build.type_of(value).rank
    key = key_of(node)
    if key == "permute":
        dims: Any = node.kwargs.get("dims", node.args[1:])
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        return permute(build, value, [int(d) for d in dims])
    if key == "getattr" and node.args[1] not in ("T", "mT"):
        return None
    if rank < 2:
        return value
    order = list(range(rank))
    if key == "transpose":
        args = named(node, "input dim0 dim1")
        a, b = args["dim0"], args["dim1"]
    else:
        a, b = (0, 1) if rank == 2 else (-2, -1)
        if rank != 2 and not (key == "getattr" and node.args[1] == "mT") and key != "mT":
            return None
    order[a], order[b] = order[b], order[a]
    return permute(build, value, order)


def raise_movedim(build: Builder, node: fx.Node) -> Arg | None:
    """movedim(x, from, to) → permute."""
    args = named(node, "input source destination")
    value, source, to = build.value(args["input"]), args.get("source"), args.get("destination")
    if not isinstance(source, int) or not isinstance(to, int):
        return None
    rank = build.type_of(value).rank
    order = [d for d in range(rank) if d != source % rank]
    order.insert(to % rank, source % rank)
    return permute(build, value, order)


def slice_dim(build: Builder, value: Arg, dim: int, start: Any, stop: Any, step: Any = 1) -> Arg | None:
    """value[…, start:stop:step, …] along `dim`; itself when that is everything; None when bounds are symbolic."""
    kind = build.type_of(value)
    size = kind.shape[dim]
    start, stop, step = map(_known, (start, stop, step))
    start = 0 if start is None else start
    step = 1 if step is None else step
    whole = stop is None or (isinstance(stop, int) and stop >= 2**62)
    if start == 0 and step == 1 and (whole or (isinstance(stop, fx.Node) and dim_of(fake(stop)) == size)):
        return value
    bounds = (start, step) if whole else (start, step, stop)
    if not size.is_Integer or not all(isinstance(b, int) for b in bounds):
        return _head(build, value, dim, stop) if (start, step) == (0, 1) and not whole else None
    lo, hi, by = slice(start, None if whole else stop, step).indices(int(size))
    if (lo, hi, by) == (0, int(size), 1):
        return value
    shape = (*kind.shape[:dim], sympy.Integer(len(range(lo, hi, by))), *kind.shape[dim + 1 :])
    return build.emit("slice", (value,), Type(kind.dtype, shape), dim=dim, start=lo, stop=hi, step=by)


def _known(bound: Any) -> Any:
    """A bound that is a node, as the number that it is where it is one."""
    value = fake(bound) if isinstance(bound, fx.Node) else bound
    size = dim_of(value) if isinstance(value, torch.SymInt) else value
    return int(size) if isinstance(size, int | sympy.Integer) and isinstance(bound, fx.Node) else bound


def _head(build: Builder, value: Arg, dim: int, stop: Any) -> Arg | None:
    """value[…, :stop, …] where sizes are symbolic: `head`, its length in its type."""
    kind = build.type_of(value)
    if isinstance(stop, int):
        length = kind.shape[dim] + stop if stop < 0 else None
    else:
        length = (
            dim_of(fake(stop)) if isinstance(stop, fx.Node) and isinstance(fake(stop), int | torch.SymInt) else None
        )
    if length is None or (length.is_Integer and length < 0):
        return None
    to = Type(kind.dtype, (*kind.shape[:dim], length, *kind.shape[dim + 1 :]))
    return build.emit("head", (value,), to, dim=dim)


def raise_chunk(build: Builder, node: fx.Node) -> Arg | None:
    """chunk, split, unbind, tensor_split → a slice each."""
    value, results = build.value(node.args[0]), fake(node)
    key = key_of(node)
    position = 1 if key == "unbind" else 2
    dim = node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)
    if not isinstance(dim, int) or not all(isinstance(r, torch.Tensor) for r in results):
        return None
    rank = build.type_of(value).rank
    dim %= rank
    sizes = [1] * len(results) if key == "unbind" else [r.shape[dim] for r in results]
    if not all(isinstance(s, int) for s in sizes):
        return None
    pieces: list[Arg] = []
    at = 0
    for size, result in zip(sizes, results, strict=True):
        piece = slice_dim(build, value, dim, at, at + size)
        if piece is None:
            return None
        pieces.append(reshape(build, piece, type_of_fake(result)))
        at += size
    return tuple(pieces)


def raise_narrow(build: Builder, node: fx.Node) -> Arg | None:
    """narrow(x, dim, start, length) → slice; select(x, dim, i) → slice and reshape."""
    value = build.value(node.args[0])
    args = named(node, "input dim start length" if key_of(node) == "narrow" else "input dim index")
    dim = args["dim"] % build.type_of(value).rank
    start = args.get("start", args.get("index"))
    if not isinstance(start, int):
        return None
    piece = slice_dim(build, value, dim, start, start + args.get("length", 1) or None)
    return None if piece is None else reshape(build, piece, type_of_fake(fake(node)))


def raise_expand(build: Builder, node: fx.Node) -> Arg | None:
    """expand, expand_as, broadcast_to → expand; nothing when the shape stays."""
    value, to = build.value(node.args[0]), type_of_fake(fake(node))
    return value if build.type_of(value).shape == to.shape else build.emit("expand", (value,), to)


def raise_repeat(build: Builder, node: fx.Node) -> Arg | None:
    """repeat(x, reps) and tile → repeat; the count along each axis in `reps`."""
    reps = node.args[1:]
    if not reps:
        return None
    reps = tuple(reps[0]) if len(reps) == 1 and isinstance(reps[0], (tuple, list)) else reps
    return build.emit("repeat", (build.value(node.args[0]),), type_of_fake(fake(node)), reps=tuple(map(_count, reps)))


def _count(rep: Any) -> int | str:
    if isinstance(rep, fx.Node):
        size = dim_of(fake(rep))
        return int(size) if size.is_Integer else str(size)
    return rep


def raise_repeat_interleave(build: Builder, node: fx.Node) -> Arg | None:
    """repeat_interleave(x, n, dim) with a number n."""
    args = named(node, "input repeats dim")
    value = build.value(args["input"])
    kind = build.type_of(value)
    dim = args.get("dim")
    if not isinstance(args.get("repeats"), int) or (dim is None and kind.rank != 1):
        return None
    attrs = {"repeats": args["repeats"], "dim": (dim or 0) % kind.rank}
    return build.emit("repeat_interleave", (value,), type_of_fake(fake(node)), **attrs)


def raise_cat(build: Builder, node: fx.Node) -> Arg | None:
    """cat and stack of tensors."""
    args = named(node, "tensors dim")
    if not isinstance(args.get("dim", 0), int):
        return None
    return build.emit(key_of(node), (build.value(args["tensors"]),), type_of_fake(fake(node)), dim=args.get("dim", 0))


def mask_rows(build: Builder, mask: Ref, count: sympy.Expr) -> tuple[Ref, ...]:
    """The index vectors of a boolean mask's `count` true places; the same mask gives the same value again."""
    if mask.name not in build.rows:
        rank = build.type_of(mask).rank
        build.rows[mask.name] = build.emit_many("where_indices", (mask,), (Type("i64", (count,)),) * rank)
    found = build.rows[mask.name]
    assert isinstance(found, tuple)
    return tuple(r for r in found if isinstance(r, Ref))


def raise_where(build: Builder, node: fx.Node) -> Arg | None:
    """where(mask) and nonzero(as_tuple=True) → where_indices; where(c, a, b) → where."""
    key = key_of(node)
    if key == "where" and len(node.args) + len(node.kwargs) == 3:
        args = named(node, "condition input other")
        operands = tuple(build.value(args[name]) for name in ("condition", "input", "other"))
        return build.emit("where", operands, type_of_fake(fake(node)))
    mask = build.value(node.args[0])
    if not isinstance(mask, Ref):
        return None
    if key == "nonzero" and not node.kwargs.get("as_tuple", len(node.args) > 1):
        return build.emit("nonzero", (mask,), type_of_fake(fake(node)))
    return mask_rows(build, mask, dim_of(fake(node)[0].shape[0]))


def _index_parts(build: Builder, value: Arg, index: Any, result: Any) -> tuple[Arg, int, tuple[Arg, ...]] | None:
    """Split x[index] into basic slices, done at once, and adjacent index tensors from one axis on."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    rank = build.type_of(value).rank
    used = sum(_axes(build, item) for item in items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - used)
    tensors: list[Arg] = []
    first, last, axis, basic = -1, -1, 0, value
    for place, item in enumerate(items):
        if item is None:
            continue
        if isinstance(item, fx.Node) and isinstance(fake(item), torch.Tensor):
            if last >= 0 and last != place - 1:
                return None
            first, last = (axis if first < 0 else first), place
            at_item = build.value(item)
            if not isinstance(at_item, Ref) or build.type_of(at_item).rank == 0 or build.type_of(at_item).dtype == "u8":
                return None
            if build.type_of(at_item).dtype != "bool":
                tensors.append(at_item)
            elif at_item.name in build.rows or isinstance(result, torch.Tensor):
                kept = [i for i in items[:place] if not isinstance(i, int)]
                tensors.extend(mask_rows(build, at_item, _rows_at(result, len(kept))))
            else:
                return None
        else:
            lo, hi, by = (item.start, item.stop, item.step) if isinstance(item, slice) else (item, None, 1)
            if not isinstance(item, slice):
                if not isinstance(item, int) or isinstance(item, bool):
                    return None
                hi = item + 1 or None
            sliced = slice_dim(build, basic, axis, lo, hi, by)
            if sliced is None:
                return None
            basic = sliced
        axis += _axes(build, item)
    return basic, first, tuple(tensors)


def _rows_at(result: Any, axis: int) -> sympy.Expr:
    return dim_of(result.shape[axis]) if isinstance(result, torch.Tensor) else sympy.Symbol("rows", integer=True)


def _axes(build: Builder, item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    value = fake(item) if isinstance(item, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) and value.dtype == torch.bool else 1


def raise_index(build: Builder, node: fx.Node) -> Arg | None:
    """x[…] → slices and reshapes, then index(x, i…){dim} for adjacent index tensors; the first of a loop's rows."""
    source, index = node.args[0], node.args[1]
    result = fake(node)
    first = first_rows(build, node)
    if first is not None:
        return first
    if isinstance(build.value(source), tuple):
        held = build.value(source)
        return held[index] if isinstance(held, tuple) and isinstance(index, int) else None
    value = build.value(source)
    if not isinstance(value, Ref) or not isinstance(result, torch.Tensor):
        return None
    parts = _index_parts(build, value, index, result)
    if parts is None:
        return None
    basic, dim, tensors = parts
    to = type_of_fake(result)
    if not tensors:
        return reshape(build, basic, to)
    if any(build.type_of(t).rank == 0 for t in tensors):
        return None
    kind = build.type_of(basic)
    tensors = spread(build, tensors)
    lead = build.type_of(tensors[0]).shape
    if any(build.type_of(t).shape != lead for t in tensors):
        if not _counted_apart(build, tensors):
            return None
        lead = to.shape[dim : dim + 1]
    shape = (*kind.shape[:dim], *lead, *kind.shape[dim + len(tensors) :])
    rows = build.emit("index", (basic, *tensors), Type(kind.dtype, shape), dim=dim)
    return rows if len(shape) == to.rank else build.emit("reshape", (rows,), to)


def _counted_apart(build: Builder, tensors: tuple[Arg, ...]) -> bool:
    """Whether indices are vectors whose lengths data decides: torch takes them as equal, by whatever name."""
    shapes = [build.type_of(t).shape for t in tensors]
    return all(len(shape) == 1 and bool(shape[0].free_symbols) for shape in shapes)


def spread(build: Builder, tensors: tuple[Arg, ...]) -> tuple[Arg, ...]:
    """Tensors on the axes that all of them together have; axes of size 1, or missing ones, are expanded."""
    kinds = [build.type_of(t) for t in tensors]
    rank = max(kind.rank for kind in kinds)
    wide = [(sympy.S.One,) * (rank - kind.rank) + kind.shape for kind in kinds]
    whole = tuple(next((s[i] for s in wide if s[i] != 1), sympy.S.One) for i in range(rank))
    made: list[Arg] = []
    for tensor, kind, shape in zip(tensors, kinds, wide, strict=True):
        if any(d not in (1, size) for d, size in zip(shape, whole, strict=True)):
            return tensors
        seen = reshape(build, tensor, Type(kind.dtype, shape))
        made.append(seen if shape == whole else build.emit("expand", (seen,), Type(kind.dtype, whole)))
    return tuple(made)


def raise_index_select(build: Builder, node: fx.Node) -> Arg | None:
    """index_select(x, dim, i) → index."""
    args = named(node, "input dim index")
    value = build.value(args["input"])
    dim = args["dim"] % build.type_of(value).rank
    return build.emit("index", (value, build.value(args["index"])), type_of_fake(fake(node)), dim=dim)


def raise_embedding(build: Builder, node: fx.Node) -> Arg | None:
    """embedding(ids, table) → index: rows of a table, whatever they hold."""
    args = named(node, "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse")
    # With these a row is changed when it is read, or has a gradient of its own.
    if any(args.get(n) not in (None, False) for n in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")):
        return None
    operands = (build.value(args["weight"]), build.value(args["input"]))
    return build.emit("index", operands, type_of_fake(fake(node)), dim=0)


def raise_index_put(build: Builder, node: fx.Node) -> Arg | None:
    """x[i…] = v and index_put(x, (i…), v, accumulate) → index_put(x, v, i…)."""
    args = named(node, "input indices values accumulate")
    value = build.value(args["input"])
    if not isinstance(value, Ref):
        return None
    index = args["indices"]
    if isinstance(index, (tuple, list)) and None in index:  # a new axis in x[…] = v, a whole axis in index_put
        return None
    parts = _index_parts(build, value, index, _written_rows(index, args["values"]))
    if parts is None:
        return None
    basic, dim, tensors = parts
    if basic != value or not tensors or any(build.type_of(t).rank == 0 for t in tensors):
        return None
    operands = (value, build.value(args["values"]), *tensors)
    return build.emit(
        "index_put", operands, build.type_of(value), dim=dim, accumulate=bool(args.get("accumulate", False))
    )


def _written_rows(index: Any, source: Any) -> Any:
    """What is written at the places of one mask, when it has a row for each of them."""
    single = index[0] if isinstance(index, (tuple, list)) and len(index) == 1 else index
    mask = fake(single) if isinstance(single, fx.Node) else None
    values = fake(source) if isinstance(source, fx.Node) else None
    if not isinstance(mask, torch.Tensor) or not isinstance(values, torch.Tensor) or values.dim() == 0:
        return None
    return None if dim_of(values.shape[0]).is_Integer else values


def raise_one_hot(build: Builder, node: fx.Node) -> Arg | None:
    """one_hot(ids, n); n as the text of its expression where it is symbolic."""
    args = named(node, "input num_classes")
    classes = build.value(args.get("num_classes"))
    if not isinstance(classes, int | str):
        return None
    return build.emit("one_hot", (build.value(args["input"]),), type_of_fake(fake(node)), classes=classes)


def raise_setitem(build: Builder, node: fx.Node) -> Arg | None:
    """x[i] = v, in place."""
    said = raise_index_put(build, node)
    return opaque(build, node) if said is None else said
