"""What torch asks before it calls compiled code again: that the experts of a rolled loop are still alike.

One expert is traced for all. Dynamo guards what it traced, and the tensors of every expert, which the graph takes; it
would not notice that another one is now a module of another class, or has other children, another number or function.
Hooks follow the rule of torch (`torch._dynamo.config.skip_nnmodule_hook_guards`): one that is added later is not seen.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from torch._dynamo import config
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, DictGetItemSource, Source, UnspecializedNNModuleSource

from moec.capture.alike import HOOKS, attributes

_CONSTANTS = (bool, int, float, str, type(None))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


def child(source: Source, name: str) -> Source:
    """Where a module's child comes from."""
    return UnspecializedNNModuleSource(DictGetItemSource(AttrSource(source, "_modules"), name))


def guard_module(module: nn.Module, source: Source) -> None:
    """Compile anew where the module, or one within it, is another than now in what a rolled body reads of it."""
    guards = [source.make_guard(GuardBuilder.TYPE_MATCH)]
    if module._modules:
        guards.append(AttrSource(source, "_modules").make_guard(GuardBuilder.DICT_KEYS_MATCH))
    if not config.skip_nnmodule_hook_guards:
        empty = GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT
        guards += [AttrSource(source, hooks).make_guard(empty) for hooks in HOOKS]
    for name, value in attributes(module):
        kind = _kind(value)
        if kind is not None:
            guards.append(AttrSource(source, name).make_guard(kind))
    install_guard(*guards)
    for name, inner in module._modules.items():
        if inner is not None:
            guard_module(inner, child(source, name))


def _kind(value: object) -> Any:
    """The guard that asks whether an attribute has this value; None for what has no value to compare cheaply."""
    if type(value) in _CONSTANTS:
        return GuardBuilder.CONSTANT_MATCH
    return GuardBuilder.FUNCTION_MATCH if isinstance(value, _FUNCTIONS) else None
