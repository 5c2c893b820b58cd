"""From masks to indices: the numbers and experts of a token's pairs, as instructions on [T, k] tensors.

A pair that is not kept gets expert −1, which no kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy

from moec.ir.graph import Arg, Attr, Dim, Graph, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.rows.hot import Cond, Source, letters_of


@dataclass
class Writer:
    """Instructions that come before a root, named after it."""

    graph: Graph
    root: Instr
    instrs: list[Instr] = field(default_factory=list)
    types: dict[str, Type] = field(default_factory=dict)

    def type(self, name: str) -> Type:
        """The type of a value, old or new."""
        return self.types.get(name) or self.graph.types[name]

    def emit(self, word: str, args: tuple[Arg, ...], kind: Type, **attrs: Attr) -> str:
        """Append an instruction; the name of its result."""
        name = f"{self.root.results[0]}.{word}{len(self.instrs)}"
        while name in self.graph.types:  # another pass wrote before the same root
            name += "_"
        self.instrs.append(Instr((name,), word, args, (kind,), tuple(attrs.items()), self.root.loc))
        self.types[name] = kind
        return name

    def reshape(self, name: str, shape: Sequence[Dim], like: str = "") -> str:
        """The value in another shape; at most one size may be symbolic unless `like` has the shape."""
        kind = self.type(name)
        if kind.shape == tuple(shape):
            return name
        args = (Ref(name), Ref(like)) if like else (Ref(name),)
        ones = {} if like else unit_axes(kind.shape, tuple(shape))
        return self.emit("reshape", args, Type(kind.dtype, tuple(shape)), **ones)

    def column(self, name: str) -> str:
        """The value, made anew where it is a step on the way to another: no node may hold it, an index a column say."""
        made = self.graph.defs.get(name)
        if made is None or name in self.types:
            return name
        viewed = self.graph.defs.get(f"{name}.1")  # w[rows, slots, None]: a node holds what the last step made
        if made.word == "index" and viewed is not None and viewed.word == "reshape" and viewed.args[0] == Ref(name):
            return self.reshape(viewed.results[0], made.types[0].shape)
        source = self.graph.types[made.uses[0]] if made.uses else Type("any")
        if made.word == "reshape" and source.rank == 2 and source.shape[1] == 1 and made.types[0].rank == 1:
            again = self.column(made.uses[0])
            return name if again == made.uses[0] else again
        if made.word == "reshape" and f"{name}.1" in self.graph.defs:
            return self.reshape(self.column(made.uses[0]), made.types[0].shape)
        if made.word != "slice" or (made.attr("dim"), made.attr("step")) != (1, 1) or source.rank != 2:
            return name
        start, length = made.attr("start"), made.types[0].shape[1]
        if not isinstance(start, int) or not length.is_Integer:
            return name
        return self.emit("narrow", (Ref(made.uses[0]),), made.types[0], dim=1, start=start, length=int(length))

    def permute(self, name: str, order: Sequence[int]) -> str:
        """The value with its axes in another order."""
        if list(order) == list(range(len(order))):
            return name
        kind = self.type(name)
        to = Type(kind.dtype, tuple(kind.shape[i] for i in order))
        return self.emit("permute", (Ref(name),), to, dims=tuple(order))

    def expand_over(self, name: str, tokens: str, shape: tuple[Dim, ...]) -> str:
        """The value, with axes of size 1 where it is the same, for each of the tokens [..., H]."""
        return self.emit("expand_over", (Ref(name), Ref(tokens)), Type(self.type(name).dtype, shape))

    def cast(self, name: str, dtype: str) -> str:
        """The value in another dtype."""
        kind = self.type(name)
        return name if kind.dtype == dtype else self.emit("cast", (Ref(name),), Type(dtype, kind.shape), dtype=dtype)


def unit_axes(source: tuple[Dim, ...], to: tuple[Dim, ...]) -> dict[str, Attr]:
    """Which axes of size 1 a reshape drops, then adds; nothing where one size at most is symbolic, or it does more."""
    if not _symbolic(to) or [d for d in source if d != 1] != [d for d in to if d != 1]:
        return {}
    drops = tuple(i for i, d in enumerate(source) if d == 1)
    return {"drops": drops, "adds": tuple(i for i, d in enumerate(to) if d == 1)}


def _symbolic(shape: Sequence[Dim]) -> bool:
    """Whether more than one size is symbolic."""
    return sum(not d.is_Integer for d in shape) > 1


@dataclass(frozen=True)
class Choice:
    """Where pairs live: the choice value, its letters, and which of them (the last, or none) are slots."""

    base: str
    slots: str

    def letters(self, graph: Graph) -> str:
        """The letters of the choice's axes."""
        return "".join(letters_of(graph.types[self.base].rank))


def at_pairs(out: Writer, source: Source, choice: Choice) -> str | NoMatch:
    """A value's number for each pair, in the choice's axes (slots of size 1 where all slots share it)."""
    letters = choice.letters(out.graph)
    base = out.type(choice.base)
    size = dict(zip(letters, base.shape, strict=True))
    kind = out.type(source.name)
    for label, dim in zip(source.axes, kind.shape, strict=True):
        if label == "e":
            size["e"] = dim
    flat = "".join(label for label in source.axes if label != "1")
    if set(flat) - set(letters) - {"e"} or len(set(flat)) != len(flat):
        return NoMatch(f"%{source.name} has axes {source.axes} beside the tokens' {letters}", source.name)
    shape = tuple(size[c] for c in flat)
    if _symbolic(shape) and shape != kind.shape and not unit_axes(kind.shape, shape):
        return NoMatch(f"%{source.name} has axes {source.axes} of unknown sizes", source.name)
    value = out.reshape(source.name, shape)
    order = [c for c in (*letters, "e") if c in flat]
    value = out.permute(value, [flat.index(c) for c in order])
    missing = "".join(c for c in letters if c not in flat)
    if missing not in ("", letters[-1]):
        return NoMatch(f"%{source.name} is not a number a token", source.name)
    dtype, last = kind.dtype, len(order) - 1
    if "e" not in order:
        return out.reshape(value, (*base.shape[:-1], sympy.S.One)) if missing else value
    if missing:
        return out.emit("gather", (Ref(value), Ref(choice.base)), Type(dtype, base.shape), dim=last)
    index = out.reshape(choice.base, (*base.shape, sympy.S.One))
    found = out.emit("gather", (Ref(value), Ref(index)), Type(dtype, (*base.shape, sympy.S.One)), dim=last)
    return out.reshape(found, base.shape)


def kept(out: Writer, conds: Sequence[Cond], choice: Choice) -> str | NoMatch:
    """Whether each pair meets all conditions; '' when there are none."""
    result = ""
    for cond in sorted(conds, key=lambda c: c.witness):
        value = at_pairs(out, Source(cond.witness, cond.axes), choice)
        if isinstance(value, NoMatch):
            return value
        shape = out.type(value).shape
        if cond.limit:
            value = out.emit("below", (Ref(value), Ref(cond.limit)), Type("bool", shape))
        value = out.cast(value, "bool")
        if cond.inverse:
            value = out.emit("lt", (Ref(value), 1), Type("bool", shape))
        if result:
            shape = _wider(out.type(result).shape, shape)
            value = out.emit("bitwise_and", (Ref(result), Ref(value)), Type("bool", shape))
        result = value
    return result


def _wider(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...]:
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def routed(
    out: Writer, choice: Choice, factors: Sequence[Source], conds: Sequence[Cond], dtype: str
) -> tuple[str, str] | NoMatch:
    """(weights[T, k], experts[T, k]) of one choice: the product of its factors, −1 where a pair is not kept."""
    base = out.type(choice.base)
    keep = kept(out, conds, choice)
    if isinstance(keep, NoMatch):
        return keep
    experts = choice.base
    if keep:
        experts = out.emit("where", (Ref(keep), Ref(choice.base), -1), Type(base.dtype, base.shape))
    weights = ""
    for factor in factors:
        value = at_pairs(out, factor, choice)
        if isinstance(value, NoMatch):
            return value
        if not weights:
            weights = value
            continue
        kind = Type(
            _wide(out.type(weights).dtype, out.type(value).dtype),
            _wider(out.type(weights).shape, out.type(value).shape),
        )
        weights = out.emit("mul", (Ref(weights), Ref(value)), kind)
    if not weights:
        weights = out.emit("ge", (Ref(experts), 0), Type("bool", base.shape))
    if out.type(weights).shape != base.shape:
        weights = out.emit("expand_as", (Ref(weights), Ref(experts)), Type(out.type(weights).dtype, base.shape))
    weights = out.cast(weights, dtype)
    slots = base.shape[-1] if choice.slots else sympy.S.One
    if not slots.is_Integer:
        return NoMatch(f"a token has {slots} slots", choice.base)
    tokens = sympy.Mul(*(base.shape[:-1] if choice.slots else base.shape))
    return out.reshape(weights, (tokens, slots)), out.reshape(experts, (tokens, slots))


_RANK = {"bool": 0, "u8": 1, "i8": 1, "i16": 2, "i32": 3, "i64": 4, "f16": 5, "bf16": 5, "f32": 6, "f64": 7}


def _wide(a: str, b: str) -> str:
    """The dtype of a product."""
    return a if _RANK.get(a, 6) >= _RANK.get(b, 6) else b


def joined(out: Writer, parts: Sequence[str]) -> str:
    """[T, k] tensors side by side."""
    if len(parts) == 1:
        return parts[0]
    kinds = [out.type(p) for p in parts]
    total: Dim = sympy.Add(*(k.shape[1] for k in kinds))
    return out.emit("cat", (tuple(map(Ref, parts)),), Type(kinds[0].dtype, (kinds[0].shape[0], total)), dim=1)
