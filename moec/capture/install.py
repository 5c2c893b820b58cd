"""Switching rolling on and off: the code objects of functions that loop over experts are exchanged in place.

Only their bytecode changes, and only by a branch that is taken while Dynamo traces for moec; eager calls, other
backends, closures, decorators and `super()` go on as before, whoever holds the function.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.hooks import RemovableHandle

from moec.capture.helpers import Known
from moec.capture.rewrite import promising, promising_by, rewrite
from moec.capture.state import NotRolled

_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass
class _Installation:
    """What was switched on in this process."""

    seen: set[int] = field(default_factory=set)  # ids of classes and functions, kept alive below
    kept: list[object] = field(default_factory=list)
    originals: list[tuple[types.FunctionType, types.CodeType]] = field(default_factory=list)
    declined: list[NotRolled] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)


@functools.lru_cache(maxsize=1)
def _installation() -> _Installation:
    return _Installation()


def install() -> None:
    """Switch rolling on for every module class that is loaded, and for later ones at their first instance."""
    state = _installation()
    for cls in _subclasses(nn.Module):
        install_class(cls)
    if not state.hooks:
        state.hooks += [
            register_module_parameter_registration_hook(_on_registration),
            register_module_module_registration_hook(_on_registration),
        ]


def uninstall() -> None:
    """Put every function's own code back and forget what was seen."""
    state = _installation()
    for function, code in state.originals:
        function.__code__ = code
    for hook in state.hooks:
        hook.remove()
    _installation.cache_clear()


def declined() -> tuple[NotRolled, ...]:
    """The loops that look like loops over experts and stay as written, with reasons."""
    return tuple(_installation().declined)


def declined_in(model: Callable[..., Any]) -> tuple[NotRolled, ...]:
    """Those in the code of a model: its modules' classes and the functions of their files that they name.

    Of a plain function, the loops that would be rolled if a module's forward called it.
    """
    if not isinstance(model, nn.Module):
        return tuple(one for function in functions_of(model) for one in _direct(function, set()))
    classes = {base for module in model.modules() for base in type(module).__mro__ if base not in (object, nn.Module)}
    own = {inner for cls in classes for value in vars(cls).values() for inner in functions_of(value)}
    own |= {helper for function in own for helper in _helpers(function)}
    lines = {(f.__code__.co_filename, line) for f in own for _, _, line in f.__code__.co_lines()}
    return tuple(one for one in declined() if (one.file, one.line) in lines)


_DIRECT = (
    "a function that is compiled itself is traced as it was written; call it in the forward of a module, compile that"
)


def _direct(function: types.FunctionType, seen: set[int]) -> Iterator[NotRolled]:
    """The loops of a function that no module's class knows, and of those that it names."""
    code = function.__code__
    if id(function) in seen or id(function) in _installation().seen:
        return
    seen.add(id(function))
    if promising(code):
        result = rewrite(code)
        yield from result.declined
        if result.code is not None:
            yield NotRolled(_DIRECT, code.co_filename, code.co_firstlineno)
    for helper in _helpers(function):
        yield from _direct(helper, seen)


def install_class(cls: type) -> None:
    """Switch rolling on for the functions that a class holds, its bases included."""
    for base in cls.__mro__:
        if _first_time(base):
            for value in list(vars(base).values()):
                for function in functions_of(value):
                    install_function(function, base)


def install_function(function: Callable[..., Any], cls: type = object) -> None:
    """Switch rolling on for one function (of a class), those it wraps, and the functions of its file that it names.

    torch's own are left alone, and not gone through: their names lead to all of torch, and none is part of a model.
    """
    for inner in functions_of(function):
        if not _first_time(inner) or inner.__code__.co_filename.startswith(_TORCH):
            continue
        known = _known(inner, cls)
        if promising(inner.__code__) or promising_by(inner.__code__, known):
            _exchange(inner, known)
        for helper in _helpers(inner):
            install_function(helper)


def _helpers(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """The functions that a function names, and those of plain classes: a loop over experts may stand in one of them.

    Only those of the same program: a library that it uses is none of its own.
    """
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, types.FunctionType) and _same_program(value.__globals__, function.__globals__):
            yield value
        if isinstance(value, type) and not issubclass(value, nn.Module):
            known = _same_program(_names_of(value), function.__globals__)
            yield from (inner for held in vars(value).values() for inner in functions_of(held) if known)


def _names_of(cls: type) -> dict[str, object]:
    """The names of the module that a class stands in."""
    return vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}


def _same_program(theirs: dict[str, object], ours: dict[str, object]) -> bool:
    """Whether two modules are one file, or of one package, or the first one's file lies beside the second one's."""
    if theirs is ours:
        return True
    packages = [str(names.get("__name__", "")).partition(".")[0] for names in (theirs, ours)]
    if packages[0] == packages[1]:
        return True
    mine, other = (str(names.get("__file__") or "") for names in (ours, theirs))
    return bool(mine) and other.startswith(os.path.dirname(mine) + os.sep) and "site-packages" not in other


def _exchange(function: types.FunctionType, known: Known) -> None:
    state = _installation()
    result = rewrite(function.__code__, known)
    state.declined += result.declined
    if result.code is not None:
        state.originals.append((function, function.__code__))
        function.__code__ = result.code


def _known(function: types.FunctionType, cls: type) -> Known:
    """The helpers that a function of a class may call."""
    named = functools.partial(_named, function.__globals__)
    return Known(functools.partial(_method, cls), named)


def _named(names: dict[str, object], name: str) -> types.FunctionType | None:
    """A plain function of the same file."""
    value = names.get(name)
    return value if isinstance(value, types.FunctionType) and value.__globals__ is names else None


def _method(cls: type, name: str) -> types.FunctionType | None:
    """A plain method of a class, with the code that it was written with."""
    value = getattr(cls, name, None)
    return value if isinstance(value, types.FunctionType) else None


def functions_of(value: object) -> Iterator[types.FunctionType]:
    """The Python functions in a class attribute: itself, what it wraps, and what its closure holds."""
    todo, seen = [value], set[int]()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            yield value
            todo += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            todo += [vars(value)["__wrapped__"]] if "__wrapped__" in vars(value) else []
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            todo.append(value.__func__)
        elif isinstance(value, property):
            todo += [value.fget, value.fset]
        elif isinstance(value, functools.partial):
            todo.append(value.func)


def _filled(cell: types.CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, (types.FunctionType, types.MethodType, functools.partial))
    except ValueError:
        return False


def _subclasses(cls: type) -> Iterator[type]:
    todo, seen = [cls], set[type]()
    while todo:
        cls = todo.pop()
        if cls not in seen:
            seen.add(cls)
            yield cls
            todo += type.__subclasses__(cls)


def _first_time(thing: object) -> bool:
    state = _installation()
    if id(thing) in state.seen:
        return False
    state.seen.add(id(thing))
    state.kept.append(thing)
    return True


def _on_registration(module: nn.Module, name: str, value: object) -> None:
    if torch.compiler.is_compiling():  # a module made or changed inside a compiled function: nothing to see here
        return
    cls = type(module)
    if id(cls) not in _installation().seen:
        install_class(cls)
