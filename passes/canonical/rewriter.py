"""Rewrite instructions one by one to others that make the same value: the tool behind canonical forms.

A rule says an instruction anew: as another instruction with the same result, as a value that is there already, or not
at all. What it needs besides is emitted before it. Rules are tried again on what they made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moec.ir.graph import Arg, Attr, Dim, Graph, Instr, Ref, Type, substitute

MOST = 12
"""How often rules are tried on one instruction."""

STORED = frozenset({"reshape", "permute"})
"""Views under which a parameter is still a parameter."""


@dataclass
class Rewriter:
    """The state of one walk over a graph.

    graph    as it was before          grad     values with a gradient, those that were emitted included
    defs     what makes each value now types    of each value, old or new
    finish   rules for what is emitted, as it is emitted
    """

    graph: Graph
    grad: set[str]
    defs: dict[str, Instr] = field(default_factory=dict[str, Instr])
    types: dict[str, Type] = field(default_factory=dict[str, Type])
    made: list[Instr] = field(default_factory=list[Instr])
    finish: Sequence[Callable[[Rewriter, Instr], Instr | Ref | None]] = ()
    _at: Instr | None = None
    _fresh: int = 0

    def type(self, arg: Arg) -> Type:
        """The type of a value; `any` for a literal."""
        return self.types[arg.name] if isinstance(arg, Ref) else Type("any")

    def by(self, arg: Arg, *words: str) -> Instr | None:
        """The instruction that makes a value, if it is one of these words."""
        made = self.defs.get(arg.name) if isinstance(arg, Ref) else None
        return made if made is not None and made.word in words else None

    def behind(self, arg: Arg, *words: str) -> Arg:
        """The value that `arg` is after instructions of these words alone."""
        while (made := self.by(arg, *words)) is not None:
            arg = made.args[0]
        return arg

    def is_zero(self, arg: Arg) -> bool:
        """Whether a value is 0 everywhere."""
        if not isinstance(arg, Ref):
            return arg in (0, 0.0)
        made = self.by(self.behind(arg, "reshape", "expand", "cast", "same"), "full")
        return made is not None and made.attr("value") == 0.0

    def stored(self, arg: Arg) -> bool:
        """Whether a value is an input of floats, or a view of one."""
        arg = self.behind(arg, *STORED)
        return isinstance(arg, Ref) and arg.name not in self.defs and self.type(arg).dtype in ("f32", "bf16", "f16")

    def held(self, arg: Arg) -> bool:
        """Whether a value can be read when the graph is lowered: an input, or what rules made.

        What stands between the parts of one line of the user's has no node of its own.
        """
        return isinstance(arg, Ref) and (arg.name not in self.defs or arg.name not in self.graph.types)

    def emit(self, word: str, args: Sequence[Arg], kind: Type, **attrs: Attr) -> Ref:
        """A value that is made before the instruction at hand."""
        assert self._at is not None
        self._fresh += 1
        name = f"{self._at.results[0]}.p{self._fresh}"
        instr = Instr((name,), word, tuple(args), (kind,), tuple(attrs.items()), self._at.loc)
        self.types[name] = kind
        for rule in self.finish:
            said = rule(self, instr)
            instr = said if isinstance(said, Instr) else instr
        self.made.append(instr)
        self.defs[name] = instr
        if not self.grad.isdisjoint(self._at.results) and not self.grad.isdisjoint(instr.uses):
            self.grad.add(name)
        return Ref(name)

    def undone(self, arg: Arg, shape: Sequence[Dim]) -> Ref | None:
        """The value of this shape that `arg` is a reshape of, where it can be read."""
        made = self.by(arg, "reshape")
        source = None if made is None else made.args[0]
        same = isinstance(source, Ref) and self.type(source).shape == tuple(shape) and self.held(source)
        return source if same and isinstance(source, Ref) else None

    def reshape(self, arg: Arg, shape: Sequence[Dim]) -> Arg:
        """The value in another shape."""
        kind = self.type(arg)
        if kind.shape == tuple(shape):
            return arg
        return self.undone(arg, shape) or self.emit("reshape", (arg,), Type(kind.dtype, tuple(shape)))

    def permute(self, arg: Arg, order: Sequence[int]) -> Arg:
        """The value with its axes in another order."""
        if list(order) == list(range(len(order))):
            return arg
        kind = self.type(arg)
        return self.emit("permute", (arg,), Type(kind.dtype, tuple(kind.shape[i] for i in order)), dims=tuple(order))


Rule = Callable[[Rewriter, Instr], Instr | Ref | None]
"""Says an instruction anew, as another with the same results or as a value; None: as it is."""


@dataclass(frozen=True)
class Rewritten:
    """Instructions, all values with a gradient, and which names removed values go by now."""

    graph: Graph
    grad: frozenset[str]
    names: Mapping[str, str]


def rewritten(graph: Graph, rules: Sequence[Rule], grad: frozenset[str], finish: Sequence[Rule] = ()) -> Rewritten:
    """The graph with every instruction said anew until no rule has more to say; `finish`: for what rules emit."""
    state = Rewriter(graph, set(grad), finish=finish)
    state.types.update(graph.types)
    names: dict[str, str] = {}
    kept: list[Instr] = []
    for old in graph.instrs:
        (instr,) = substitute((old,), names)
        said = _said(state, rules, instr)
        kept += state.made
        state.made.clear()
        if isinstance(said, Ref):
            names[instr.results[0]] = said.name
            continue
        kept.append(said)
        state.defs.update(dict.fromkeys(said.results, said))
    outputs = tuple(names.get(name, name) for name in graph.outputs)
    return Rewritten(replace(graph, instrs=tuple(kept), outputs=outputs), frozenset(state.grad), names)


def _said(state: Rewriter, rules: Sequence[Rule], instr: Instr) -> Instr | Ref:
    for _ in range(MOST):
        state._at = instr
        found = next((said for rule in rules if (said := rule(state, instr)) is not None), None)
        if isinstance(found, Ref):
            alike = (found.name in state.grad) == (instr.results[0] in state.grad)
            return found if alike and state.type(found) == instr.types[0] else instr
        if found is None:
            return instr
        instr = found
    return instr


def again(instr: Instr, word: str, args: Sequence[Arg], **attrs: Attr) -> Instr:
    """Another instruction that makes the same value."""
    return replace(instr, word=word, args=tuple(args), attrs=tuple(attrs.items()))
