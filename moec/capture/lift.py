"""Lifting E modules' parameters into the graph that Dynamo traces, without tracing one `getattr` each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import AttrSource, DictGetItemSource, Source
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import BaseListVariable, TupleVariable
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moec.capture.alike import difference
from moec.capture.guards import child, guard_module
from moec.capture.kinds import is_item, kinds_among
from moec.capture.state import kinds_of, loop_key, loops_of, retrace_by_kind, retrace_without


def lift(ctx: Any) -> None:
    """Run by Dynamo inside `pick_from`: binds its locals `names` and `tables` to the lifted tensors of `obj`."""
    tx = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    scope = tx.symbolic_locals
    key = scope["key"].as_python_constant()
    members = _members(tx, scope["obj"].realize(), scope["_wanted"].realize())
    if not members:
        retrace_without(tx, key, "the body indexes with the loop's item what is no list of modules or tensors")
    values = [value for value, _ in members]
    modules = all(isinstance(value, nn.Module) for value in values)
    start, stop = _kind(tx, key, scope, values) if modules else (0, len(values))
    values, members = values[start:stop], members[start:stop]
    reason = difference(values) or _rewritten(tx, values) if modules else _unlike_tensors(values)
    if reason:
        retrace_without(tx, key, reason)
    if modules:
        for module, where in members:
            guard_module(module, where if isinstance(where, Source) else where.source)
    paths = [name for name, _ in _named(values[0])] if modules else [""]
    tables = [[_variable(tx, member, path) for member in members] for path in paths]
    tables = [[*table[:1] * start, *table] for table in tables]  # looked up at the items of this kind alone
    reason = next(filter(None, (_unlike_tensors([_value(var) for var in table]) for table in tables)), None)
    if reason:
        retrace_without(tx, key, reason)
    scope["names"] = TupleVariable([ConstantVariable.create(path) for path in paths])
    scope["tables"] = TupleVariable([TupleVariable(table) for table in tables])
    scope["_first"] = ConstantVariable.create(start)


def _kind(tx: Any, key: str, scope: Any, experts: Sequence[nn.Module]) -> tuple[int, int]:
    """The experts that the body is traced for: all, or those of one kind; traced again where kinds were not known."""
    kind, whole = loops_of(tx).kind, (0, len(experts))
    if kind is None or difference(experts) is None or isinstance(_value(scope["obj"].realize()), nn.ModuleDict):
        return whole
    at = scope["_at"].realize()
    if not at.is_tensor() or not is_item(at.as_proxy().node):
        return whole
    if key in kinds_of(tx):
        return kind
    found = kinds_among(experts)
    return retrace_by_kind(tx, key, found) if found else whole


def same_method(ctx: Any) -> None:
    """Run by Dynamo inside `expects`: gives the loop up where a helper is another one than was written out."""
    tx = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    key, name, where = (tx.symbolic_locals[each].as_python_constant() for each in ("key", "name", "where"))
    held = tx.symbolic_locals["obj"].realize()
    value = _value(held) if name else None
    function = getattr(type(value), name, None) if name else getattr(held, "fn", None)
    code = getattr(function, "__code__", None)
    if code is None or loop_key(code.co_filename, code.co_firstlineno) != where or (name and name in vars(value)):
        method = f"{name} is another method than the one of the class that the loop stands in"
        what = method if name else "a function that the body calls is another one than its file defines"
        retrace_without(tx, key, what)


Member = tuple[Any, Any]  # the value (real, or fake for an intermediate) and its source or its variable


def _members(tx: Any, var: Any, wanted: Any) -> list[Member]:
    if isinstance(var, BaseListVariable):
        items = [item.realize() for item in var.items]
        return [] if any(_value(item) is None for item in items) else [(_value(item), item) for item in items]
    value = _value(var)
    if isinstance(value, nn.ModuleDict):
        names = list(value.keys())
        asked = [name.as_python_constant() for name in wanted.items]
        return _children(value, var.source, _numbered(asked, names) if asked else names)
    if isinstance(value, nn.ModuleList):
        return _children(value, var.source, list(value._modules))
    if isinstance(value, nn.ParameterList | nn.ParameterDict):
        source = AttrSource(var.source, "_parameters")
        names = list(value._parameters)
        asked = [name.as_python_constant() for name in wanted.items]
        return [_parameter(tx, value, source, name) for name in (_numbered(asked, names) if asked else names)]
    return []


def _parameter(tx: Any, holder: nn.Module, source: Source, name: str) -> Member:
    exchanged = _exchanged(tx, holder._parameters, name)
    if exchanged is None:
        return holder._parameters[name], DictGetItemSource(source, name)
    return _value(exchanged), exchanged


def _numbered(asked: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """The names `expert_0`, `expert_1`, … of a dictionary, which may hold others; none where a number is left out."""
    found = [name for name in asked if name in names]
    return found if found == list(asked[: len(found)]) else []


def _value(var: Any) -> Any:
    if var.is_tensor():
        return var.proxy.node.meta.get("example_value")
    value = getattr(var, "value", None)
    return value if isinstance(value, nn.Module) and var.source is not None else None


def _children(parent: nn.Module, source: Source, names: Sequence[str]) -> list[Member]:
    return [(parent._modules[name], child(source, name)) for name in names]


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _variable(tx: Any, member: Member, path: str) -> Any:
    value, where = member
    if not isinstance(where, Source):
        if not path:
            return where
        where = where.source
    if not path:
        return VariableBuilder(tx, where)(value)
    *parents, leaf = path.split(".")
    module = value
    for name in parents:
        where, module = child(where, name), module._modules[name]
    field = "_parameters" if leaf in module._parameters else "_buffers"
    exchanged = _exchanged(tx, getattr(module, field), leaf)
    if exchanged is not None:
        return exchanged
    return VariableBuilder(tx, DictGetItemSource(AttrSource(where, field), leaf))(getattr(module, leaf))


def _exchanged(tx: Any, holder: dict[str, Any], name: str) -> Any:
    """What the traced code has put into a module's dictionary, as `functional_call` does; None where nothing."""
    held = _written(tx, holder)
    return None if held is None else held.getitem_const(tx, ConstantVariable.create(name)).realize()


def _written(tx: Any, thing: object) -> Any:
    """Dynamo's variable of a real object that the traced code has written to, else None."""
    var = tx.output.side_effects.id_to_variable.get(id(thing))
    return var if var is not None and tx.output.side_effects.is_modified(var) else None


def _rewritten(tx: Any, experts: Sequence[nn.Module]) -> str | None:
    """The first expert whose attributes or children are other ones than `difference` saw."""
    for i, expert in enumerate(experts):
        if any(_written(tx, module) or _written(tx, module._modules) for module in expert.modules()):
            return f"expert {i} gets other attributes or children in the code that is compiled"
    return None


def _unlike_tensors(values: Sequence[Any]) -> str | None:
    if not all(isinstance(value, torch.Tensor) for value in values):
        return "the body indexes with the loop's item a list that mixes tensors and others"
    first = values[0]
    for i, value in enumerate(values):
        if (value.dtype, value.device) != (first.dtype, first.device) or not _same_shape(value, first):
            return (
                f"tensor {i} of the list is {value.dtype}{list(value.shape)}, tensor 0 {first.dtype}{list(first.shape)}"
            )
    return None


def _same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether sizes are known to be equal; two sizes that only data decide are not."""
    return a.dim() == b.dim() and all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))
