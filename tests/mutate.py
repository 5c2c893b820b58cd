"""Graphs that differ in one thing: mutants of a captured FX graph, each still a program that runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.passes.raising.words import key_of

SWAPS = {
    "silu": torch.nn.functional.gelu,
    "gelu": torch.nn.functional.relu,
    "relu": torch.nn.functional.silu,
    "sigmoid": torch.tanh,
    "softmax": torch.sigmoid,
}


@dataclass(frozen=True)
class Mutant:
    """One change: what it is, and the function that makes it in a copy of the graph."""

    what: str
    make: Callable[[fx.Graph, dict[fx.Node, fx.Node]], None]


def mutants(gm: fx.GraphModule) -> Iterator[Mutant]:
    """Every mutant of the graph, in the order of its nodes."""
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            yield from _numbers(node)
            yield from _operands(node)
            yield from _swapped(node)
            yield from _second_user(node)
            yield from _scaled(node)
            yield from _lists(node)


def mutated(gm: fx.GraphModule, mutant: Mutant) -> fx.GraphModule:
    """A copy of the graph with the change; compile it as a function, so that it is traced anew."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    mutant.make(graph, env)
    graph.lint()
    return fx.GraphModule(gm, graph)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every part of an argument, with the way to it."""
    if isinstance(value, (tuple, list)):
        for i, each in enumerate(value):
            yield from _paths(each, (*path, i))
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _paths(each, (*path, name))
    elif isinstance(value, slice):
        for name in ("start", "stop", "step"):
            yield from _paths(getattr(value, name), (*path, name))
    else:
        yield path, value


def _put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The argument with one part exchanged."""
    if not path:
        return new
    head, rest = path[0], path[1:]
    if isinstance(value, slice):
        parts = {name: getattr(value, name) for name in ("start", "stop", "step")}
        return slice(*(_put(part, rest, new) if name == head else part for name, part in parts.items()))
    if isinstance(value, dict):
        return {name: _put(each, rest, new) if name == head else each for name, each in value.items()}
    return type(value)(_put(each, rest, new) if i == head else each for i, each in enumerate(value))


def _set(node: fx.Node, path: tuple[Any, ...], new: Callable[[dict[fx.Node, fx.Node]], Any], what: str) -> Mutant:
    def make(graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
        copy = env[node]
        both = _put({"args": copy.args, "kwargs": dict(copy.kwargs)}, path, new(env))
        copy.args, copy.kwargs = both["args"], both["kwargs"]

    return Mutant(f"{node.name}: {what}", make)


def _arguments(node: fx.Node) -> Iterator[tuple[tuple[Any, ...], Any]]:
    return _paths({"args": node.args, "kwargs": dict(node.kwargs)})


def _numbers(node: fx.Node) -> Iterator[Mutant]:
    """k, axes, bounds, steps, flags, factors: each constant changed."""
    for path, value in _arguments(node):
        if isinstance(value, bool):
            yield _set(node, path, lambda env, v=value: not v, f"{value} → {not value}")
        elif isinstance(value, int) and abs(value) < 1 << 40:
            for new in (value + 1, value - 1, 0 if value == 1 else 1):
                yield _set(node, path, lambda env, n=new: n, f"{value} → {new}")
        elif isinstance(value, float):
            for new in (value * 1.25 + 0.125, -value):
                yield _set(node, path, lambda env, n=new: n, f"{value} → {new}")


def _like(node: fx.Node) -> Any:
    value = node.meta.get("example_value")
    return (tuple(map(str, value.shape)), value.dtype) if isinstance(value, torch.Tensor) else None


def _operands(node: fx.Node) -> Iterator[Mutant]:
    """Another value of the same type read instead: swapped gate and up, a tied expert, the wrong choice."""
    before: list[fx.Node] = []
    for other in node.graph.nodes:
        if other is node:
            break
        before.append(other)
    for path, value in _arguments(node):
        if not isinstance(value, fx.Node) or _like(value) is None:
            continue
        others = [o for o in before if o is not value and _like(o) == _like(value)]
        for other in others[-2:] + others[:1]:
            yield _set(node, path, lambda env, o=other: env[o], f"reads {other.name} for {value.name}")


def _swapped(node: fx.Node) -> Iterator[Mutant]:
    """Another function; the operands in the other order."""
    new = SWAPS.get(key_of(node))
    if new is not None:

        def exchange(graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
            copy = env[node]
            with graph.inserting_after(copy):
                fresh = graph.call_function(new, copy.args[:1])
            copy.replace_all_uses_with(fresh)
            graph.erase_node(copy)
            env[node] = fresh

        yield Mutant(f"{node.name}: another function than {key_of(node)}", exchange)
    if node.target in (operator.truediv, operator.sub, operator.floordiv) and len(node.args) == 2:

        def reverse(graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
            env[node].args = env[node].args[::-1]

        yield Mutant(f"{node.name}: operands exchanged", reverse)


def _second_user(node: fx.Node) -> Iterator[Mutant]:
    """The value is needed once more, at the end: its sum is returned too."""
    if not _is_float(node):
        return

    def use(graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
        output = next(n for n in graph.nodes if n.op == "output")
        with graph.inserting_before(output):
            total = graph.call_method("sum", (env[node],))
        output.args = ((*output.args[0], total),)

    yield Mutant(f"{node.name}: a second user", use)


def _scaled(node: fx.Node) -> Iterator[Mutant]:
    """The value times two, from here on."""
    if not _is_float(node):
        return

    def scale(graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
        copy = env[node]
        users = list(copy.users)
        with graph.inserting_after(copy):
            twice = graph.call_function(operator.mul, (copy, 2.0))
        for user in users:
            user.replace_input_with(copy, twice)

    yield Mutant(f"{node.name}: doubled", scale)


def _lists(node: fx.Node) -> Iterator[Mutant]:
    """Lists of tensors (experts) in another order, or one of them twice."""
    for i, arg in enumerate(node.args):
        if not isinstance(arg, (list, tuple)) or len(arg) < 2 or not all(isinstance(a, fx.Node) for a in arg):
            continue
        orders = {"first two exchanged": (1, 0, *range(2, len(arg))), "the first twice": (0, 0, *range(2, len(arg)))}
        for what, order in orders.items():
            new = lambda env, a=arg, o=order: [env[a[j]] for j in o]  # noqa: E731
            yield _set_argument(node, i, new, what)


def _set_argument(node: fx.Node, i: int, new: Callable[[dict[fx.Node, fx.Node]], Any], what: str) -> Mutant:
    def make(graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
        copy = env[node]
        copy.args = (*copy.args[:i], new(env), *copy.args[i + 1 :])

    return Mutant(f"{node.name}: {what}", make)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
