"""Raise torch's FX graph to canonical words.

Dynamo's graph is imperative: `x /= y` and `y.index_add_(…)` change what a later use of the same node means. Here every
such update is a new value, no-op views and casts disappear, and each spelling of an operation becomes one word.
`carriers` remembers which FX node holds which value from which position on, so that lowering can put results back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

import moec.ir.graph
from moec.ir.dtypes import GRAPH_NAMES
from moec.ir.graph import Arg, Attr, Graph, Instr, Ref, Type, normal_dim

ANY = Type("any")

_ROLLING = str(Path(moec.ir.graph.__file__).parents[1] / "capture")
"""Where the code lies that stands in for a rolled loop's own lines."""


@dataclass(frozen=True)
class Raised:
    """A graph in canonical words, and where its values live in the FX graph.

    carriers  value → (FX node, position): from that position on, the node holds the value
    order     FX node → its position
    """

    graph: Graph
    carriers: Mapping[str, tuple[tuple[fx.Node, int], ...]]
    order: Mapping[fx.Node, int]


Raiser = Callable[["Builder", fx.Node], "Arg | None"]
"""Emits a node's instructions and returns what the node then stands for; None: not understood, make it opaque."""


@dataclass
class Builder:
    """The state of one raise: what each node stands for now, the instructions so far, what makes each value."""

    env: dict[fx.Node, Arg] = field(default_factory=dict)
    instrs: list[Instr] = field(default_factory=list)
    types: dict[str, Type] = field(default_factory=dict)
    defs: dict[str, Instr] = field(default_factory=dict)
    carriers: dict[str, list[tuple[fx.Node, int]]] = field(default_factory=dict)
    aliases: dict[int, list[fx.Node]] = field(default_factory=dict)
    rows: dict[str, Arg] = field(default_factory=dict)
    position: int = 0
    node: fx.Node | None = None
    fresh: int = 0

    def emit(self, word: str, args: tuple[Arg, ...], *types: Type, **attrs: Attr) -> Ref:
        """Append an instruction; its first result."""
        return self.emit_many(word, args, types, **attrs)[0]

    def emit_many(self, word: str, args: tuple[Arg, ...], types: tuple[Type, ...], **attrs: Attr) -> tuple[Ref, ...]:
        """Append an instruction with several results."""
        assert self.node is not None
        stem = f"{self.node.name}.{self.fresh}" if self.fresh else self.node.name
        self.fresh += 1
        names = (stem,) if len(types) == 1 else tuple(f"{stem}.r{i}" for i in range(len(types)))
        loc = location(self.node)
        made = Instr(names, word, args, types, tuple(attrs.items()), loc)
        self.instrs.append(made)
        self.defs.update(dict.fromkeys(names, made))
        self.types.update(zip(names, types, strict=True))
        return tuple(map(Ref, names))

    def type_of(self, arg: Arg) -> Type:
        """The type of a value; `any` for a literal."""
        return self.types.get(arg.name, ANY) if isinstance(arg, Ref) else ANY

    def value(self, arg: Any) -> Arg:
        """What an FX argument stands for at this point."""
        if isinstance(arg, fx.Node):
            return self.env[arg]
        if isinstance(arg, (tuple, list)):
            return tuple(self.value(a) for a in arg)
        if isinstance(arg, torch.dtype):
            return GRAPH_NAMES.get(arg, str(arg))
        if isinstance(arg, (bool, int, float, str)) or arg is None:
            return arg
        return str(arg)

    def hold(self, node: fx.Node, value: Arg) -> None:
        """From here on `node` stands for `value`."""
        self.env[node] = value
        if isinstance(value, Ref):
            self.carriers.setdefault(value.name, []).append((node, self.position))

    def mutate(self, node: fx.Node, value: Ref) -> None:
        """`node`'s storage now holds `value`; its other views hold something that only torch can say.

        It is what they held if `value` turns out to be the value before.
        """
        key = storage_key(node)
        before = self.env[node]
        for alias in dict.fromkeys([node, *self.aliases.get(key, ())]) if key is not None else [node]:
            held = self.env[alias]
            if held == before:
                self.hold(alias, value)
            elif isinstance(held, Ref):
                self.hold(alias, self.emit("changed_view", (held, value, before), self.type_of(held)))


def location(node: fx.Node) -> str:
    """`file:line` of the user's code that made the node, or ''."""
    return _innermost(node.meta.get("stack_trace") or "")


@lru_cache(maxsize=4096)
def _innermost(trace: str) -> str:
    """`file:line` of a trace's last line that is the user's; nodes of repeated layers share one trace."""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ") and _ROLLING not in line]
    if not lines:
        return ""
    path, _, rest = lines[-1].removeprefix('File "').partition('", line ')
    return f"{path}:{rest.partition(',')[0]}"


def fake(node: fx.Node) -> Any:
    """The fake value that Dynamo traced for the node."""
    return node.meta.get("example_value", node.meta.get("val"))


def type_of_fake(value: Any) -> Type:
    """The canonical type of a fake value."""
    if not isinstance(value, torch.Tensor):
        return ANY
    shape = tuple(value.shape)
    if all(type(size) is int for size in shape):
        return _plain_type(value.dtype, shape)
    return Type(_dtype_word(value.dtype), tuple(map(dim_of, shape)))


@lru_cache(maxsize=4096)
def _plain_type(dtype: torch.dtype, shape: tuple[int, ...]) -> Type:
    """A type without symbols; a model of many experts has thousands of parameters of few types."""
    return Type(_dtype_word(dtype), tuple(map(sympy.Integer, shape)))


def _dtype_word(dtype: torch.dtype) -> str:
    return GRAPH_NAMES.get(dtype, str(dtype))


def dim_of(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return sympy.Integer(size) if isinstance(size, int) else normal_dim(size.node.expr)


def storage_key(node: fx.Node) -> int | None:
    """Identity of the storage behind the node's fake value."""
    return _storage_of(fake(node))


def _storage_of(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def raise_graph(
    gm: fx.GraphModule, raisers: Callable[[fx.Node], Raiser | None], apart: frozenset[fx.Node] = frozenset()
) -> Raised:
    """The canonical form of Dynamo's graph; `raisers` knows how a kind of node is said; those `apart` stay opaque."""
    build = Builder()
    inputs: list[tuple[str, Type]] = []
    outputs: list[str] = []
    order: dict[fx.Node, int] = {}
    for build.position, node in enumerate(gm.graph.nodes):
        order[node] = build.position
        value = fake(node)
        build.node, build.fresh = node, 0
        if node.op in ("placeholder", "get_attr"):
            inputs.append((node.name, type_of_fake(value)))
            build.types[node.name] = inputs[-1][1]
            build.hold(node, Ref(node.name))
        elif node.op == "output":
            outputs.extend(dict.fromkeys(_returned(build.value(node.args[0]))))
        else:
            build.hold(
                node, _raise_node(build, node, raisers(node)) if node not in apart else _raise_apart(build, node)
            )
        key = _storage_of(value)
        if key is not None:
            build.aliases.setdefault(key, []).append(node)
    for name, _ in inputs:
        node = next(n for n, _ in build.carriers[name])
        changed = build.env[node]
        if isinstance(changed, Ref) and changed.name != name:
            outputs.append(changed.name)
    graph = Graph(tuple(inputs), tuple(build.instrs), tuple(dict.fromkeys(outputs)))
    return Raised(graph, {name: tuple(at) for name, at in build.carriers.items()}, order)


def _returned(value: Arg) -> list[str]:
    if isinstance(value, Ref):
        return [value.name]
    return [name for item in value for name in _returned(item)] if isinstance(value, tuple) else []


def _raise_node(build: Builder, node: fx.Node, raiser: Raiser | None) -> Arg:
    value = fake(node)
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        size = dim_of(value)
        return int(size) if size.is_Integer else str(size)
    if raiser is not None:
        said = raiser(build, node)
        if said is not None:
            return said
    return opaque(build, node)


def _raise_apart(build: Builder, node: fx.Node) -> Arg:
    """A node that stays, whether or not something reads it."""
    said, value = opaque(build, node, "effect"), fake(node)
    return said if not isinstance(value, (int, torch.SymInt)) else _raise_node(build, node, None)


def opaque(build: Builder, node: fx.Node, word: str = "opaque") -> Arg:
    """An instruction whose meaning is not known beyond its target, operands and result types."""
    args = (*(build.value(a) for a in node.args), *(build.value(a) for a in node.kwargs.values()))
    value = fake(node)
    many = isinstance(value, (tuple, list)) and len(value) > 0
    types = tuple(map(type_of_fake, value)) if many else (type_of_fake(value),)
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    results = build.emit_many(word, args, types, target=str(target))
    return results if many else results[0]
