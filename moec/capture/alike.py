"""Whether E modules are one module with E sets of tensors: then the code of the first stands for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Held by every module and compared elsewhere, or without effect on a call.
_OWN = frozenset(
    (
        *HOOKS,
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_is_full_backward_hook",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    )
)


def difference(modules: Sequence[nn.Module]) -> str | None:
    """The first thing in which a module differs from the first one, or None where they are alike."""
    hooked = _hooked(modules[0], "expert 0")
    if hooked:
        return hooked
    for i, module in enumerate(modules[1:], 1):
        reason = _differs(modules[0], module, f"expert {i}")
        if reason:
            return reason
    return None


def _hooked(module: nn.Module, name: str) -> str | None:
    if any(getattr(module, hooks, None) for hooks in HOOKS):
        return f"{name} has hooks"
    for child_name, child in module._modules.items():
        reason = _hooked(child, f"{name}.{child_name}") if child is not None else None
        if reason:
            return reason
    return None


def _differs(a: nn.Module, b: nn.Module, name: str) -> str | None:
    if type(a) is not type(b):
        return f"{name} is a {type(b).__name__}, expected {type(a).__name__} as in expert 0"
    if any(getattr(b, hooks, None) for hooks in HOOKS):
        return f"{name} has hooks"
    for field in ("_parameters", "_buffers", "_modules"):
        if list(getattr(a, field)) != list(getattr(b, field)):
            return f"{name} has {field} {list(getattr(b, field))}, expected {list(getattr(a, field))} as in expert 0"
    return _held_differ(a, b, name) or _attributes_differ(a, b, name) or _children_differ(a, b, name)


def _held_differ(a: nn.Module, b: nn.Module, name: str) -> str | None:
    for held, others in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
        for key, x in held.items():
            reason = _tensors_differ(x, others[key], f"{name}.{key}")
            if reason:
                return reason
    return None


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's own attributes: no tensors, children or hooks."""
    return ((name, value) for name, value in module.__dict__.items() if name not in _OWN)


def _attributes_differ(a: nn.Module, b: nn.Module, name: str) -> str | None:
    if a.__dict__.keys() != b.__dict__.keys():
        return f"{name} has attributes that expert 0 lacks, or the other way round"
    for key, x in attributes(a):
        if not _same(x, b.__dict__[key]):
            return f"{name}.{key} is {_short(b.__dict__[key])}, expected {_short(x)} as in expert 0"
    return None


def _children_differ(a: nn.Module, b: nn.Module, name: str) -> str | None:
    for key, child in a._modules.items():
        other = b._modules[key]
        if child is None or other is None:
            reason = None if child is other else f"{name}.{key} is there in one expert and None in another"
        else:
            reason = _differs(child, other, f"{name}.{key}")
        if reason:
            return reason
    return None


def _tensors_differ(x: Tensor | None, y: Tensor | None, name: str) -> str | None:
    if x is None or y is None:
        return None if x is y else f"{name} is there in one expert and None in another"
    for what in ("shape", "dtype", "device", "requires_grad", "layout", "__class__"):
        if getattr(x, what) != getattr(y, what):
            return f"{name}.{what} is {getattr(y, what)}, expected {getattr(x, what)} as in expert 0"
    if x.stride() != y.stride():
        return f"{name} has strides {y.stride()}, expected {x.stride()} as in expert 0"
    return None


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if type(x) is not type(y) or isinstance(x, Tensor):
        return False
    try:
        return bool(x == y)
    except Exception:  # an __eq__ of the user's: whatever it raises, the two cannot be called the same
        return False


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 60 else text[:57] + "..."
