"""What runs where a kernel cannot: eager's form, with a warning, or an error where an engine was asked for by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

from torch import Tensor

from moec.errors import BuildError, CodegenError
from moec.ir.engine import Engine
from moec.ir.spec import KernelSpec

_T = TypeVar("_T")


@lru_cache(maxsize=64)
def warn_once(reason: str) -> None:
    warnings.warn(f"moec: eager experts instead of a kernel: {reason}", RuntimeWarning, stacklevel=2)


def or_twin(mode: Engine, run: Callable[[], _T], eager: Callable[[], _T]) -> _T:
    """What Triton kernels give; eager's, with one warning, where they cannot be compiled for the device."""
    try:
        return run()
    except BuildError as error:
        if mode.kind != "auto":
            raise
        warn_once(str(error))
        return eager()


def takes_or_raise(takes: bool, spec: str, engine: str, tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel runs; raises CodegenError where it cannot and an engine was asked for by name."""
    if not takes and engine != "auto":
        found = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
        wanted = KernelSpec.parse(spec).experts.dtype
        raise CodegenError(
            f"engine {engine!r} has kernels for x in f32, bf16 or f16 and parameters in {wanted}, got {found}; "
            "use engine 'auto', which computes other dtypes in plain PyTorch"
        )
    return takes
