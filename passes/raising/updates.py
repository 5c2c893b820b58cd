"""Which nodes update tensors in place, in each spelling: `f_(x)`, `f(x, inplace=True)`, `f(x, out=y)`, by schema."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import fx

from moec.ir.graph import Arg, Ref
from moec.passes.raising.raise_graph import Builder, fake, opaque, type_of_fake

RESHAPING = frozenset(
    [
        "squeeze_",
        "unsqueeze_",
        "t_",
        "transpose_",
        "swapaxes_",
        "swapdims_",
        "resize_",
        "resize_as_",
        "as_strided_",
        "set_",
    ]
)
"""Updates of a tensor's shape: they change what the traced type of every earlier node says."""


def reshapes(node: fx.Node, key: str) -> bool:
    """Whether the node changes a tensor's shape in place."""
    return key in RESHAPING and not sets_to_itself(node, key)


def sets_to_itself(node: fx.Node, key: str) -> bool:
    """`p.data = p.to(dtype)` of a parameter that has the dtype already: Dynamo says `p.set_(p)`."""
    given = list(nodes_in(node.args))
    return key == "set_" and len(given) == 2 and fake(given[0]) is fake(given[1])


def is_update(node: fx.Node, key: str) -> bool:
    """Whether the name says that the first argument, or every tensor in it, is updated."""
    return (key.endswith("_") and not key.endswith("__")) or bool(node.kwargs.get("inplace"))


def has_inplace_flag(node: fx.Node) -> bool:
    """Whether the node passes inplace=True, by keyword or by position."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    at = _flag_position(node.target) if isinstance(node.target, FunctionType) else None
    return at is not None and at < len(node.args) and bool(node.args[at])


@lru_cache(maxsize=256)
def _flag_position(target: FunctionType) -> int | None:
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


def nodes_in(arg: Any) -> Iterator[fx.Node]:
    """The nodes in an argument."""
    if isinstance(arg, fx.Node):
        yield arg
    elif isinstance(arg, (tuple, list)):
        for each in arg:
            yield from nodes_in(each)


def writes_out(build: Builder, node: fx.Node) -> Arg | None:
    """f(x, out=y): y holds the result."""
    said = opaque(build, node)
    targets = list(nodes_in(node.kwargs["out"]))
    values = said if isinstance(said, tuple) else (said,)
    for base, value in zip(targets, values, strict=True):
        if isinstance(value, Ref):
            build.mutate(base, value)
    return said


def writes_keyword(build: Builder, node: fx.Node) -> Arg | None:
    """f_(input=x): x holds the result."""
    said = opaque(build, node)
    base = node.kwargs.get("input", node.kwargs.get("self"))
    if isinstance(base, fx.Node) and isinstance(said, Ref):
        build.mutate(base, said)
    return said


def writes_all(build: Builder, node: fx.Node) -> Arg | None:
    """_foreach_f_([x, y], …): every tensor of the list holds something that only torch can say."""
    said = opaque(build, node, "effect")
    for base in nodes_in(node.args[0]):
        build.mutate(base, build.emit("changed", (build.value(base),), type_of_fake(fake(base))))
    return said


def written(node: fx.Node, overload: torch._ops.OpOverload) -> Iterator[fx.Node]:
    """The nodes that an operator's schema says it writes to, positional, by keyword or in lists."""
    arguments = overload._schema.arguments
    given = [*zip(arguments, node.args, strict=False), *((a, node.kwargs.get(a.name)) for a in arguments)]
    for spec, arg in given:
        if spec.alias_info is not None and spec.alias_info.is_write:
            yield from nodes_in(arg)
