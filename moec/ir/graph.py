"""The graph that passes read and write: an immutable list of instructions in canonical words.

It is purely functional. A user's in-place update is a new value, a no-op view is gone, every contraction is
`contract`, and so on (moec.passes.raising writes it, moec.passes.lowering carries the result back to torch's graph).
Value names are the names of the torch.fx nodes that made them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from moec.ir.dims import Dim, dim_text
from moec.ir.dims import normal_dim as normal_dim
from moec.ir.lex import word_text


@dataclass(frozen=True)
class Type:
    """A tensor's dtype (`f32`, `bf16`, `i64`, …) and shape; a non-tensor has dtype `any` and no shape."""

    dtype: str
    shape: tuple[Dim, ...] = ()

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __str__(self) -> str:
        bare = self.dtype == "any" and not self.shape
        return "any" if bare else f"{word_text(self.dtype)}[{', '.join(map(dim_text, self.shape))}]"


@dataclass(frozen=True, repr=False)
class Ref:
    """A use of the value of this name."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


Literal = int | float | bool | str | None
Arg = Ref | Literal | tuple["Arg", ...]
Attr = int | float | bool | str | None | tuple["Attr", ...]


@dataclass(frozen=True)
class Instr:
    """`%results = word(args) {attrs} : types  # loc`."""

    results: tuple[str, ...]
    word: str
    args: tuple[Arg, ...]
    types: tuple[Type, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()
    loc: str = ""

    def attr(self, name: str) -> Attr:
        """The attribute's value; KeyError names the word."""
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(f"{self.word} has no attribute {name!r}")

    def numbers(self, name: str) -> tuple[int, ...]:
        """An attribute that is a tuple of numbers, the order of axes of a permute for instance."""
        value = self.attr(name)
        assert isinstance(value, tuple)
        return tuple(int(str(each)) for each in value)

    @cached_property
    def uses(self) -> tuple[str, ...]:
        """Names of the values used, in order, with repetitions."""
        return tuple(_refs(self.args))


def _refs(args: Iterable[Arg]) -> Iterator[str]:
    for arg in args:
        if isinstance(arg, Ref):
            yield arg.name
        elif isinstance(arg, tuple):
            yield from _refs(arg)


@dataclass(frozen=True)
class Graph:
    """Inputs, instructions in execution order, and outputs (returned values, then effects on inputs)."""

    inputs: tuple[tuple[str, Type], ...]
    instrs: tuple[Instr, ...]
    outputs: tuple[str, ...]

    @cached_property
    def defs(self) -> Mapping[str, Instr]:
        """The instruction that defines each value; inputs have none."""
        return {name: instr for instr in self.instrs for name in instr.results}

    @cached_property
    def types(self) -> Mapping[str, Type]:
        """The type of every value."""
        return dict(self.inputs) | {
            name: kind for instr in self.instrs for name, kind in zip(instr.results, instr.types, strict=True)
        }

    @cached_property
    def users(self) -> Mapping[str, tuple[Instr, ...]]:
        """The instructions that use each value, in order."""
        found: dict[str, list[Instr]] = {}
        for instr in self.instrs:
            for name in dict.fromkeys(instr.uses):
                found.setdefault(name, []).append(instr)
        return {name: tuple(users) for name, users in found.items()}

    @cached_property
    def skips(self) -> tuple[Instr, ...]:
        """The instructions that leave out an iteration of a loop."""
        return tuple(instr for instr in self.instrs if instr.word in SKIPS)

    @cached_property
    def position(self) -> Mapping[str, int]:
        """The index of the defining instruction of each value; inputs are at -1."""
        return {name: -1 for name, _ in self.inputs} | {
            name: i for i, instr in enumerate(self.instrs) for name in instr.results
        }

    def behind(self, arg: Arg, words: Collection[str]) -> Arg:
        """The value that `arg` is after instructions of these words alone, each applied to its first argument."""
        while isinstance(arg, Ref):
            made = self.defs.get(arg.name)
            if made is None or made.word not in words or not made.args:
                break
            arg = made.args[0]
        return arg

    def is_zero(self, arg: Arg, words: Collection[str] = ()) -> bool:
        """Whether a value is the number 0, or 0 everywhere, behind instructions of these words."""
        arg = self.behind(arg, words)
        if not isinstance(arg, Ref):
            return arg in (0, 0.0)
        made = self.defs.get(arg.name)
        return made is not None and made.word == "full" and made.attr("value") in (0, 0.0)

    def with_instrs(self, instrs: Iterable[Instr]) -> Graph:
        """This graph with other instructions."""
        return replace(self, instrs=tuple(instrs))


EFFECTS = frozenset({"effect", "random"})
"""Words that stay even when nothing uses their results."""


WATCHERS = frozenset({"assert", "end"})
"""Words that have no result of interest and live only as long as what they look at."""


SKIPS = frozenset({"skip", "skip_size"})
"""Words that end an iteration of a rolled loop."""


def sweep(graph: Graph) -> Graph:
    """The graph without instructions that nothing needs. Skips live as long as their loop, a turn as its number."""
    bound = {i.results[0]: _lives_with(graph, i) for i in graph.instrs if i.word in SKIPS or i.word == "turn"}
    pinned: set[str] = set()
    while True:
        swept = _swept(graph, pinned)
        more = {name for name, other in bound.items() if other in swept.defs} - pinned
        if not more:
            return swept
        pinned |= more


def _lives_with(graph: Graph, instr: Instr) -> str:
    return instr.uses[0] if instr.word == "turn" else loop_of(graph, instr)


def loop_of(graph: Graph, skip: Instr) -> str:
    """The item of the loop whose iteration a skip ends."""
    made = skip
    while made.word not in ("anchor", "anchor_range"):
        (item,) = made.uses[:1]
        if item not in graph.defs:
            return item
        made = graph.defs[item]
    return made.results[0]


def _swept(graph: Graph, pinned: set[str]) -> Graph:
    live = set(graph.outputs) | pinned
    kept: list[Instr] = []
    for instr in reversed(graph.instrs):
        if instr.word in EFFECTS or not live.isdisjoint(instr.results):
            live.update(instr.uses)
            kept.append(instr)
        elif instr.word in WATCHERS:
            kept.append(instr)
    available = {name for name, _ in graph.inputs} | {r for i in kept if i.word not in WATCHERS for r in i.results}
    return graph.with_instrs(i for i in reversed(kept) if i.word not in WATCHERS or available.issuperset(i.uses))


def substitute(instrs: Iterable[Instr], names: Mapping[str, str]) -> Iterator[Instr]:
    """The instructions with every use of a name replaced."""

    def swap(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(names.get(arg.name, arg.name))
        return tuple(map(swap, arg)) if isinstance(arg, tuple) else arg

    for instr in instrs:
        changed = any(name in names for name in instr.uses)
        yield replace(instr, args=tuple(map(swap, instr.args))) if changed else instr
