"""Buffers taken once for a range of T: bytes that serve every call in it, reserved at a thread's first call.

What is reserved is the bound that `moec inspect --capacity` shows, at the most tokens of the range. On a CPU it is
memory that nothing has touched: pages become real only where a call writes them.
Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import sympy

from moec.codegen.backward_plan import backward_formula
from moec.codegen.plan import Rows, workspace_formula
from moec.codegen.storage import Storage
from moec.codegen.tuning import Sizes
from moec.ir.bounds import TOKENS, Size, least
from moec.ir.engine import Engine
from moec.ir.formulas import capacity_at
from moec.ir.spec import KernelSpec
from moec.ir.token_range import TokenRange
from moec.runtime.calls import calls
from moec.target import Target


@lru_cache(maxsize=1024)
def forward_bytes(
    spec: KernelSpec, sizes: Sizes, dtype: str, target: Target, threads: int, storage: Storage | None = None
) -> int:
    """Bytes of workspace for every call of a C++ kernel with up to `sizes.T` tokens, x of any strides."""
    rows = Rows(dtype, sizes.H, False)
    return at_most(workspace_formula(spec, sizes, rows, target, threads, storage), sizes.T)


@lru_cache(maxsize=1024)
def backward_bytes(
    spec: KernelSpec, sizes: Sizes, dtype: str, target: Target, threads: int, limit: int | None = None
) -> int:
    """The same for the gradients' kernel; `limit`: the most rows that one expert gets, where there is a capacity."""
    rows: Size = TOKENS * sizes.k if limit is None else least(TOKENS * sizes.k, sympy.Integer(limit))
    x = Rows(dtype, sizes.H, False)
    return at_most(backward_formula(spec, sizes, x, x, rows, target, threads), sizes.T)


def at_most(formula: Size, tokens: int) -> int:
    """The value of a formula in T, rounded up."""
    return int(sympy.ceiling(sympy.sympify(formula).subs(TOKENS, tokens)))


def reserve(size: int, mode: Engine, tokens: int) -> None:
    """Make this thread's workspace serve the declared range; a call beyond it is said once, and grows it as needed."""
    declared = TokenRange.parse(mode.tokens)
    calls().workspace(size)
    if tokens > declared.high:
        warn_beyond(mode.tokens)


@lru_cache(maxsize=64)
def warn_beyond(declared: str) -> None:
    """Say once that a call has more tokens than was declared."""
    warnings.warn(
        f"moec: a call has more tokens than its buffers were taken for (tokens={declared!r}): larger ones are taken for"
        " such calls; declare a wider range with the option `tokens`",
        RuntimeWarning,
        stacklevel=2,
    )


def most_rows(mode: Engine, tokens: int) -> int | None:
    """The most rows of one expert in a call, where the graph has a capacity."""
    return capacity_at(mode.capacity, tokens) if mode.capacity else None


def most_tokens(mode: Engine, tokens: int) -> int:
    """T that buffers are taken for: the range's end, or a call's own where it has none or goes beyond."""
    return max(tokens, TokenRange.parse(mode.tokens).high) if mode.tokens else tokens
