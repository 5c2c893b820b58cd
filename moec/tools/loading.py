"""Command-line targets: `module:callable` or `file.py:callable` → (model, args, kwargs)."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from moec.errors import TargetError
from moec.own_error import brief

SHAPE = "expected (model, args) or (model, args, kwargs)"
FORMS = "expected module:callable or file.py:callable, for example model.py:make"


@dataclass(frozen=True)
class Target:
    """A model and what to call it with."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def load(target: str) -> Target:
    """Import, call and check the target. Raises TargetError, whose text is one line."""
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise TargetError(f"target {target!r} does not name a callable; {FORMS}")
    module = _from_file(place) if place.endswith(".py") else _from_module(place)
    return _checked(target, _call(target, _find(target, module, name)))


def named(target: str) -> Any:
    """What `place:name` names, not called. Raises TargetError."""
    place, _, name = target.rpartition(":")
    module = _from_file(place) if place.endswith(".py") else _from_module(place)
    return _find(target, module, name)


def module_classes(place: str) -> list[type[nn.Module]]:
    """The module classes that a file, a package's folder or a module defines, with those of its submodules."""
    path = Path(place)
    if place.endswith(".py"):
        modules = [_from_file(place)]
    elif path.is_dir():
        if not (path / "__init__.py").is_file():
            raise TargetError(f"folder {place!r} has no __init__.py; expected a package, a file.py or a module")
        _search(path.resolve().parent)
        modules = _with_submodules(_from_module(path.resolve().name))
    else:
        modules = _with_submodules(_from_module(place))
    names = {module.__name__ for module in modules}
    found = [v for module in modules for v in vars(module).values() if isinstance(v, type)]
    return list(dict.fromkeys(c for c in found if issubclass(c, nn.Module) and c.__module__ in names))


def _with_submodules(module: ModuleType) -> list[ModuleType]:
    """A module and, of a package, those below it that can be imported."""
    found = [module]
    for each in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{module.__name__}.", onerror=lambda _: None):
        try:
            found.append(importlib.import_module(each.name))
        except (Exception, SystemExit) as error:
            warnings.warn(f"moec: {each.name} is left out: {brief(error)}", RuntimeWarning, stacklevel=2)
    return found


def load_batches(target: str) -> list[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Import and call what gives batches: each one tensor, a tuple of arguments, or (arguments, keyword arguments)."""
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise TargetError(f"batches {target!r} does not name a callable; {FORMS}")
    module = _from_file(place) if place.endswith(".py") else _from_module(place)
    made = _call(target, _find(target, module, name))
    if not isinstance(made, Iterable):
        raise TargetError(f"batches {target!r} returned {type(made).__name__}; expected a list of argument tuples")
    found = [_batch(each) for each in cast("Iterable[Any]", made)]
    if not found:
        raise TargetError(f"batches {target!r} gave none; expected at least one tuple of arguments")
    return found


def _batch(each: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if not isinstance(each, tuple | list):
        return (each,), {}
    parts = tuple(cast("tuple[Any, ...]", each))
    if len(parts) == 2 and isinstance(parts[0], tuple | list) and isinstance(parts[1], Mapping):
        return tuple(cast("tuple[Any, ...]", parts[0])), cast("Mapping[str, Any]", parts[1])
    return parts, {}


def _from_file(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        raise TargetError(f"target file {place!r} does not exist (looked in {Path.cwd()}); {FORMS}")
    # A name of its own: a user's torch.py or 01_model.py must neither hide nor be hidden by another module.
    name = f"_moec_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"target file {place!r} cannot be read as Python; {FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and inspect look a class's module up by name
    _search(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise TargetError(f"target file {place!r} fails on import: {brief(error)}") from error
    return module


def _from_module(place: str) -> ModuleType:
    _search(Path.cwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            here = f"; did you mean the file {place}.py?" if Path(f"{place}.py").is_file() else ""
            raise TargetError(f"no module {place!r} on the path or in {Path.cwd()}{here}; {FORMS}") from error
        raise TargetError(f"module {place!r} fails on import: {brief(error)}") from error
    except (Exception, SystemExit) as error:
        raise TargetError(f"module {place!r} fails on import: {brief(error)}") from error


def _search(folder: Path) -> None:
    """Let the target import its neighbours, as `python file.py` would."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _find(target: str, module: ModuleType, name: str) -> Callable[[], Any]:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            near = difflib.get_close_matches(part, public, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(public[:8]) or 'nothing callable'}"
            raise TargetError(f"target {target!r}: {part!r} is not defined there; {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise TargetError(f"target {target!r}: {name!r} is {type(found).__name__}, not a callable; {SHAPE} from a call")
    return found


def _call(target: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise TargetError(f"target {target!r}: the call without arguments failed: {brief(error)}") from error


def _checked(target: str, made: Any) -> Target:
    if not isinstance(made, tuple) or len(cast("tuple[Any, ...]", made)) not in (2, 3):
        got = f"a tuple of {len(cast('tuple[Any, ...]', made))}" if isinstance(made, tuple) else type(made).__name__
        raise TargetError(f"target {target!r} returned {got}; {SHAPE}")
    model, args, *rest = cast("tuple[Any, ...]", made)
    kwargs: Any = rest[0] if rest else {}
    if not callable(model):
        raise TargetError(f"target {target!r}: the model is {type(model).__name__}, which cannot be called; {SHAPE}")
    if not isinstance(args, tuple | list):
        raise TargetError(f"target {target!r}: args is {type(args).__name__}, expected a tuple such as (x,)")
    if not isinstance(kwargs, Mapping):
        raise TargetError(f"target {target!r}: kwargs is {type(kwargs).__name__}, expected a dict")
    return Target(model, tuple(cast("tuple[Any, ...]", args)), cast("Mapping[str, Any]", kwargs))
