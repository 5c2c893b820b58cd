"""moec: a compiler for Mixture-of-Experts layers in PyTorch.

model = torch.compile(model, backend="moec")     # no import of moec needed
print(moec.explain(model, *args))                # what was found, and why the rest was not
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.backend import explain
    from moec.options import Options
    from moec.report import Report

__all__ = ["Options", "Report", "explain"]

_HOMES = {"explain": "moec.backend", "Options": "moec.options", "Report": "moec.report"}


def __getattr__(name: str) -> Any:
    """Public names, loaded at first use: importing moec costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
