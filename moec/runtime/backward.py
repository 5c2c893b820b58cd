"""A generated CPU kernel of the experts' gradients as a Python object: what its calls are handed and give back.

Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moec.codegen.backward_plan import group_pairs, make_backward_plan
from moec.codegen.cpp import emit_backward
from moec.codegen.plan import Rows
from moec.codegen.tuning import Sizes
from moec.errors import CodegenError
from moec.ir.dtypes import DTYPE_NAMES
from moec.ir.spec import KernelSpec, stored_dtypes
from moec.runtime.calls import calls, kernel_library
from moec.runtime.cpu import CODES, bindings
from moec.target import Target


def load_backward(spec: str, target: Target | None = None) -> BackwardKernel:
    """The kernel of the gradients of a spec's experts.

    Raises CodegenError where the spec has no C++ form, BuildError where it cannot be built.
    """
    return _load(spec, target or Target.host())


@lru_cache(maxsize=1024)
def _load(text: str, target: Target) -> BackwardKernel:
    spec = KernelSpec.parse(text)
    return BackwardKernel(spec, target, kernel_library(emit_backward(spec, target), target))


def fresh(parameter: Tensor) -> Tensor:
    """New memory for a parameter's gradient."""
    return torch.empty(parameter.shape, dtype=parameter.dtype)


class BackwardKernel:
    """One built kernel. Calls are thread-safe; tensors must be on the CPU."""

    def __init__(self, spec: KernelSpec, target: Target, library: ctypes.CDLL) -> None:
        self.spec, self.target = spec, target
        self._dtypes = lru_cache(maxsize=16)(lambda count: stored_dtypes(spec.experts, count))
        self._bindings = bindings(spec)
        library.args_words.restype = ctypes.c_int64
        self._words = int(library.args_words())
        self._call = library.backward
        self._call.restype, self._call.argtypes = None, [ctypes.c_void_p]

    def takes(self, grad: Tensor, x: Tensor, params: Sequence[Tensor]) -> bool:
        """Whether the dtypes are those of the spec; others (float64, say) are the twin's."""
        known = grad.dtype in CODES and x.dtype in CODES
        return known and [p.dtype for p in params] == self._dtypes(len(params))

    def sizes(self, x: Tensor, params: Sequence[Tensor], k: int) -> Sizes:
        """The sizes of a call."""
        bound = self._bindings.of(params)
        return Sizes(x.shape[0], bound.H, bound.F, bound.E, k, bound.O)

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        params: Sequence[Tensor],
        saved: Tensor | None,
        needs: Sequence[bool],
        take: Callable[[Tensor], Tensor] = fresh,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients by x[T, H], weights[T, k] and each parameter, from y's gradient[T, O] of any strides.

        `saved`: what the forward kept, [T·k, F or 2F]; None: computed again. `needs`: as the results are ordered, which
        are wanted; the others come back empty. Sums are fp32; experts without tokens get zeros. `take`: memory for a
        parameter's gradient, contiguous.
        """
        wanted = zip(params, needs[2:], strict=True)
        dparams = [take(p) if n else torch.empty(0, dtype=p.dtype) for p, n in wanted]
        dx = torch.empty(x.shape if needs[0] else 0, dtype=x.dtype)
        chosen = experts.to(torch.int64).contiguous()
        scale = (weights if weights.dtype in CODES else weights.float()).contiguous()
        dscale = torch.empty(weights.shape if needs[1] else 0, dtype=scale.dtype)
        if x.numel() == 0 or chosen.numel() == 0:
            return dx.zero_(), dscale.to(weights.dtype).zero_(), [d.zero_() for d in dparams]
        self._run(grad, x, scale, chosen, params, saved, (dx, dscale, *dparams))
        empty = (d.view((0,) * p.dim()) if not n else d for d, p, n in zip(dparams, params, needs[2:], strict=True))
        return dx, dscale.to(weights.dtype), list(empty)

    def _run(
        self,
        grad: Tensor,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        params: Sequence[Tensor],
        saved: Tensor | None,
        results: Sequence[Tensor],
    ) -> None:
        bound, sizes = self._bindings.of(params), self.sizes(x, params, experts.shape[1])
        if x.shape[1] != bound.H or grad.shape != (x.shape[0], bound.O):
            raise CodegenError(
                f"x is {list(x.shape)} and the gradient of y {list(grad.shape)}, but the experts' parameters want "
                f"[T, {bound.H}] and [T, {bound.O}]"
            )
        plan = make_backward_plan(
            self.spec, sizes, _rows(x), _rows(grad), self._most(experts, sizes), self.target, torch.get_num_threads()
        )
        tables: list[array[int]] = []
        words = array("q", plan.words)
        words.extend((calls().workspace(plan.workspace_bytes), *_matrix(x), *_matrix(grad), experts.data_ptr()))
        words.extend((weights.data_ptr(), CODES[weights.dtype], *bound.words))
        words.extend((0 if saved is None else saved.data_ptr(), *(_address(t) for t in results[:2])))
        words.extend(self._gradients(results[2:], tables))
        if len(words) != self._words:
            raise AssertionError(f"a kernel takes {self._words} words, got {len(words)}")
        self._call(words.buffer_info()[0])

    def _most(self, experts: Tensor, sizes: Sizes) -> int:
        """A bound on the pairs of one expert: exact where it makes the workspace larger, rounded up to repeat plans."""
        most = group_pairs(self.spec, sizes.H, sizes.F, self.target)
        if experts.numel() <= most:
            return most
        known = experts[(experts >= 0) & (experts < sizes.E)]
        found = int(torch.bincount(known, minlength=1).max())
        return most if found <= most else -(-found // 256) * 256

    def _gradients(self, grads: Sequence[Tensor], tables: list[array[int]]) -> list[int]:
        """(base, stride in bytes, table) of each of `BackwardArgs`' gradients; `tables` keeps tables alive."""
        s = self.spec.experts
        count = len(grads) // len(s.param_groups)
        found: dict[str, tuple[int, int, int]] = {}
        for i, group in enumerate(s.param_groups):
            mine = grads[i * count : (i + 1) * count]
            if not any(d.numel() for d in mine):
                continue
            name = "a" if group == "ab" else "bias_a" if group == "bias_ab" else group
            if s.stacked:
                found[name] = (mine[0].data_ptr(), mine[0].stride(0) * mine[0].element_size(), 0)
            else:
                tables.append(array("q", map(_address, mine)))
                found[name] = (0, 0, tables[-1].buffer_info()[0])
        names = ("a", "b", "out", "bias_a", "bias_b", "bias_out")
        return [word for name in names for word in found.get(name, (0, 0, 0))]


def _address(t: Tensor) -> int:
    return t.data_ptr() if t.numel() else 0


def _matrix(t: Tensor) -> tuple[int, int, int, int]:
    return (t.data_ptr(), CODES[t.dtype], t.stride(0), t.stride(1))


def _rows(t: Tensor) -> Rows:
    return Rows(DTYPE_NAMES[t.dtype], t.stride(0), t.stride(1) == 1)
