"""The words that a rolled body calls: while Dynamo traces them they decide by type what an expression means."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moec.capture import ops as _ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  # registers
from moec.capture.axes import One, Span, axis_of, narrows
from moec.capture.axes import one as one  # words too
from moec.capture.axes import span as span
from moec.capture.first import first as first  # a word too
from moec.capture.keys import Key, NameKey, TextKey, are_names, key_at
from moec.capture.keys import text_key as text_key  # a word too
from moec.capture.kinds import kinds as kinds  # words too
from moec.capture.kinds import only as only
from moec.capture.members import distinct as distinct  # words too
from moec.capture.members import member as member
from moec.capture.picked import expects as expects  # a word too
from moec.capture.picked import pick_from
from moec.capture.runs import Runs
from moec.capture.runs import runs as runs  # words too
from moec.capture.runs import runs_of_first as runs_of_first
from moec.capture.state import (
    allow_data_dependence,
    compiles_for_moec,
    current_tx,
    declined,
    loops_of,
    retrace_without,
    transforming,
)
from moec.capture.totals import fix_last_total

_markers: Any = torch.ops.moec
_COMPARE = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _traces_for_moec(tx: Any) -> bool:
    # Where Dynamo skips the user's frame it meets these words as frames of their own: then nothing is rolled.
    return tx is not None and tx.f_code.co_filename != __file__ and compiles_for_moec(tx) and not transforming()


@torch.compiler.assume_constant_result
def _compiling_for_moec() -> bool:
    tx = current_tx()
    if not _traces_for_moec(tx):
        return False
    allow_data_dependence(tx)
    return True


def _may_open(tx: Any, key: str) -> bool:
    return not (key in declined(tx) or loops_of(tx).open is not None)  # one region at a time


@torch.compiler.assume_constant_result
def _opens(key: str) -> bool:
    return _may_open(current_tx(), key)


@torch.compiler.assume_constant_result
def _open(key: str) -> bool:
    tx = current_tx()
    if not _may_open(tx, key):
        return False
    loops = loops_of(tx)
    loops.open = key
    loops.begun.append(key)
    if len(tx.output.tracers) > 1:
        loops.nested.append(key)
    return True


@torch.compiler.assume_constant_result
def _close() -> None:
    loops = loops_of(current_tx())
    loops.open = loops.kind = None


@torch.compiler.assume_constant_result
def give_up(key: str, reason: str) -> NoReturn:
    """Traced in a rolled body that turns out not to be one; Dynamo starts again with the loop as written."""
    retrace_without(current_tx(), key, reason)


@torch.compiler.assume_constant_result
def _hand(key: str, what: str) -> bool:
    tx = current_tx()
    if not _traces_for_moec(tx) or key in declined(tx):
        return False
    if what == "counts" and len(tx.output.tracers) > 1:  # a checkpointed block has no such shapes
        return False
    loops = loops_of(tx)
    {"numbers": loops.handed, "rows": loops.asked, "counts": loops.counted}[what].append(key)
    allow_data_dependence(tx, numbers=what != "counts")
    return True


def handing(key: str, what: str) -> bool:
    """Whether what a function moves to the host or makes stays a symbol of this compile: the `numbers` that it moves,
    the `rows` that it lists, how many `counts` of choices it makes.
    """
    return torch.compiler.is_dynamo_compiling() and _hand(key, what)


def compiling() -> bool:
    """Whether Dynamo traces this for moec; False in eager and for any other backend."""
    return torch.compiler.is_dynamo_compiling() and _compiling_for_moec()


@torch.compiler.assume_constant_result
def _traced_by_moec() -> bool:
    return _traces_for_moec(current_tx())


def eager() -> bool:
    """Whether this is not what Dynamo traces for moec."""
    return not (torch.compiler.is_dynamo_compiling() and _traced_by_moec())


def enter(key: str) -> bool:
    """Whether the loop named `key` is to be traced as its rolled body."""
    return compiling() and _open(key)


def leave(item: Tensor) -> None:
    """Mark the end of the region."""
    _markers.end.default(item)
    _close()


def anchor(key: str, items: Any, like: Any) -> Tensor:
    """One item of `items` (rows of an integer tensor, or a range); `like` gives the device for a range."""
    if isinstance(items, Tensor):
        if items.dim() == 0 or items.is_floating_point():
            give_up(key, "the loop runs over a tensor that holds no integer rows")
        return _markers.anchor.default(items)
    if isinstance(items, range):
        return _markers.anchor_range.default(items.start, items.stop, items.step, _device(like))
    return give_up(key, "the loop runs over something that is neither a range nor a tensor")


def anchor_each(key: str, count: Any, like: Any) -> Tensor:
    """One of the places 0 … count − 1 of a sequence, or of several that are joined."""
    return _markers.anchor_range.default(0, count, 1, _device(like))


def anchor_of(key: str, items: Any, like: Any) -> Tensor:
    """One item of whatever a loop runs over: numbers, or the places of a list or of a dictionary."""
    return anchor(key, items, like) if isinstance(items, Tensor | range) else anchor_each(key, len(items), like)


def walk(key: str, items: Any, item: Tensor, as_key: bool) -> Any:
    """What `for x in items` binds x to."""
    return item if isinstance(items, Tensor | range) else each(key, items, item, as_key)


def each(key: str, items: Any, item: Tensor, as_key: bool) -> Any:
    """One of `items` by its place; of a dictionary its key, as `for name in experts` has it."""
    if not isinstance(items, nn.ModuleDict | nn.ParameterDict | dict):
        return index(key, items, item)
    if not as_key:
        give_up(key, "the body does something else with the names of a dictionary than look it up")
    return key_at(item, list(items.keys()))


def _device(like: Any) -> torch.device:
    return like.device if isinstance(like, Tensor) else torch.device("cpu")


def is_item(x: Any) -> bool:
    """A 0-d integer tensor: it may index a table or a list of modules."""
    return isinstance(x, Tensor) and x.dim() == 0 and not x.is_floating_point() and x.dtype != torch.bool


def is_row(x: Any) -> bool:
    """An integer tensor of shape [1]: an item that was not unwrapped, `for e in hit.nonzero()`."""
    return isinstance(x, Tensor) and x.dim() == 1 and x.dtype in (torch.int64, torch.int32) and x.shape[0] == 1


def item_of(x: Any) -> Any:
    """`x.item()` or `int(x)` of the loop's item: still symbolic."""
    if isinstance(x, NameKey):
        raise TypeError("the body makes a number of a name that is none in order")
    x = x.item if isinstance(x, TextKey) else x
    return x.reshape(()) if isinstance(x, Tensor) else x


def length(x: Any) -> Any:
    """`len(x)`; of a tensor the size of its first axis."""
    if isinstance(x, Runs):
        return x.sizes.shape[0]
    return x.shape[0] if isinstance(x, Tensor) else len(x)


def shortest(key: str, *sizes: int) -> int:
    """The common length of what a `zip` joins; the least where lengths depend on data."""
    least: Any = sizes[0]
    for size in sizes[1:]:
        if statically_known_true(size != least):
            give_up(key, "zip joins sequences of different lengths")
        if not statically_known_true(size == least):
            least = torch.sym_min(least, size)
    return least


def index(key: str, obj: Any, at: Any) -> Any:
    """`obj[at]` where `at` may hold the loop's item."""
    if isinstance(obj, Tensor):
        return _index_tensor(key, obj, at)
    if isinstance(obj, Runs):
        stop = _markers.take.default(obj.ends, at)
        return obj.rows[_markers.span.default(stop - _markers.take.default(obj.sizes, at), stop)]
    if is_row(at):
        at = at.reshape(())
    if is_item(at) and isinstance(obj, range):
        return obj.start + obj.step * at if (obj.start, obj.step) != (0, 1) else at
    if is_item(at) and are_names(obj):
        return key_at(at, list(obj))
    if is_item(at) or isinstance(at, Key):
        return pick_from(key, obj, at)
    return obj[at]


def _index_tensor(key: str, table: Tensor, at: Any) -> Tensor:
    if is_item(at):
        return _markers.take.default(table, at)
    if is_row(at):
        return _markers.take.default(table, at.reshape(())).unsqueeze(0)
    at = _rows_at(key, table, (at,) if isinstance(at, One) else at)
    if not isinstance(at, tuple):
        return table[at]
    # Integers select before anything else does, so each item takes its axis away first, the last one first.
    rest = list(at)
    for place in reversed([i for i, part in enumerate(rest) if is_item(part) or isinstance(part, One)]):
        axis, part = axis_of(rest, place, table.dim()), rest[place]
        first = table.permute(axis, *range(axis), *range(axis + 1, table.dim()))
        table = _markers.take.default(first, part.item if isinstance(part, One) else part)
        rest[place : place + 1] = [None] if isinstance(part, One) else []
    return table[tuple(rest)] if any(narrows(part) for part in rest) else table


def _rows_at(key: str, table: Tensor, at: Any) -> Any:
    """`start:end` of the first axis, with bounds that depend on the item, as the integers between them."""
    first = at[0] if isinstance(at, tuple) else at
    if not isinstance(first, Span):
        return at
    if first.step is not None:
        give_up(key, "a slice with bounds that depend on the item has a step")
    start = first.start if first.start is not None else 0
    stop = first.stop if first.stop is not None else table.shape[0]
    rows = _markers.span.default(_number(start, stop), _number(stop, start))
    return (rows, *at[1:]) if isinstance(at, tuple) else rows


def _number(x: Any, like: Any) -> Tensor:
    return x if isinstance(x, Tensor) else like.new_full((), x)


def store(key: str, obj: Any, at: Any, value: Any) -> None:
    """`obj[at] = value` where `at` may hold the loop's item."""
    if not isinstance(obj, Tensor):
        give_up(key, "the body stores into something that is no tensor")
    if is_item(at):
        # A whole number as index is a view in eager, and a copy into one casts.
        obj.index_put_((at,), value.to(obj.dtype) if isinstance(value, Tensor) else obj.new_tensor(value))
        return
    at = _rows_at(key, obj, at)
    if isinstance(at, tuple) and any(is_item(part) for part in at):
        give_up(key, "the body stores at an index made of the loop's item and others")
    obj[at] = value


def always(cond: Any, negate: bool) -> bool:
    """Whether a condition is a plain constant that always ends the iteration."""
    return isinstance(cond, bool) and cond != negate


def skip(key: str, item: Tensor, cond: Any, negate: bool) -> Tensor:
    """The rest of the iteration is skipped where `cond` (or, negated, not `cond`) holds."""
    if isinstance(cond, Tensor):
        if negate:
            cond = torch.logical_not(cond)
        elif cond.dtype != torch.bool:
            cond = cond != 0
        return _markers.skip.default(item, cond)
    if isinstance(cond, bool):
        return item
    if negate and isinstance(cond, int):
        return _markers.skip_size.default(item, cond)
    return give_up(key, "a condition in the body is neither a tensor, a size nor a constant")


# (comparison, right side, negated) that skip a size, which is never negative, exactly where it is 0.
_ZERO = (("==", 0, False), ("!=", 0, True), (">", 0, True), (">=", 1, True), ("<=", 0, False), ("<", 1, False))


def skip_compare(key: str, item: Tensor, left: Any, how: str, right: Any, negate: bool) -> Tensor:
    """The rest of the iteration is skipped where the comparison (or, negated, its opposite) holds."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return skip(key, item, _COMPARE[how](left, right), negate)
    if (how, right, negate) in _ZERO:
        return _markers.skip_size.default(item, left)
    return give_up(key, "a condition in the body compares sizes with something else than zero")


def expects_mask(key: str, rows: Any) -> None:
    """`if rows.any()` was left out, which asks whether there are rows only of a mask: numbers of rows may be 0."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.bool:
        give_up(key, "the body asks numbers of rows for one that is not 0")


def joint(key: str, every: bool, *conds: Any) -> Any:
    """Conditions joined by `and` (every) or `or`: a constant where one decides, else one tensor."""
    left: list[Tensor] = []
    for cond in conds:
        if isinstance(cond, Tensor):
            left.append(cond)
        elif bool(cond) != every:
            return not every
    if not left:
        return every
    joined = left[0]
    for cond in left[1:]:
        joined = torch.logical_and(joined, cond) if every else torch.logical_or(joined, cond)
    return joined


def carry(key: str, value: Any, item: Tensor) -> Tensor:
    """The loop-carried value at the head of an iteration."""
    if isinstance(value, int):
        return _markers.carry_int.default(value, item)
    if not isinstance(value, Tensor):
        give_up(key, "the body carries a value that is no tensor from one iteration to the next")
    return _markers.carry.default(value, item)


def carried(key: str, head: Tensor, new: Any, item: Tensor) -> Tensor:
    """The loop-carried value after the loop."""
    if not isinstance(new, Tensor) or new.dtype != head.dtype or new.dim() != head.dim():
        give_up(key, "a value carried by the loop changes its dtype or rank")
    return _markers.yield_.default(head, new, item)


def collect(key: str, rows: Any, item: Tensor) -> Tensor:
    """The rows of every iteration, one after the other, after the loop."""
    if not isinstance(rows, Tensor) or rows.dim() == 0:
        give_up(key, "the body collects something that is no tensor of rows")
    joined = _markers.collect.default(rows, item)
    fix_last_total()
    return joined


def select(key: str, cond: Any, yes: Any, no: Any) -> Any:
    """`yes if cond else no` of numbers, where `cond` may depend on the item."""
    if not isinstance(cond, Tensor):
        return yes if cond else no
    if not all(isinstance(x, int) or is_item(x) for x in (yes, no)):
        give_up(key, "a choice that depends on the item is between other things than whole numbers")
    return torch.where(cond, yes, no)


def running(sizes: Tensor) -> Tensor:
    """`itertools.accumulate` and `np.cumsum` of numbers that stayed a tensor."""
    return sizes.cumsum(0)


def leading(sizes: Tensor) -> Tensor:
    """`[0] + sizes` of numbers that stayed a tensor."""
    return torch.cat([sizes.new_zeros(1), sizes])


def in_place(key: str, head: Any, new: Any) -> Any:
    """After `head += …` or `head = head.to(…)` in a rolled body: the same tensor, mutated."""
    if not isinstance(head, Tensor):
        give_up(key, "the body adds in place to something that is no tensor")
    if new.dtype != head.dtype or new.device != head.device:
        give_up(key, f"the body makes the sum {new.dtype} where it began as {head.dtype}")
    return head


def keeps(key: str) -> bool:
    """Whether the lists that the loop named `key` reads stay tensors: it will be traced as its rolled body."""
    return compiling() and _opens(key)
