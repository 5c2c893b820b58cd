"""A module compiled by moec with a report of it: one compile for what it computes and for what was found in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moec.backend import Backend
from moec.options import Options
from moec.report import Report


def compiled(module: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> tuple[Any, Report]:
    """The compiled module, and the report that its first call fills; PyTorch runs what is not MoE as it is."""
    torch._dynamo.reset()
    report = Report()
    backend = Backend(Options.make({"rest": "eager", **options}), report=report)
    return torch.compile(module, backend=backend, dynamic=dynamic), report
