"""codegen: from KernelSpec to kernels. EMITTERS says who writes the source for which engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moec.codegen import cpp
from moec.ir.spec import KernelSpec
from moec.target import Target

EMITTERS: Mapping[str, Callable[[KernelSpec, Target], str]] = MappingProxyType({"cpp": cpp.emit})
