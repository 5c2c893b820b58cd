"""The gradients of a spec's experts by Triton kernels: the backward half of `moec.runtime.triton`.

Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moec.codegen.plan import Sizes
from moec.codegen.triton_backward import Wanted, backward_config, backward_program
from moec.codegen.triton_call import Program
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_emit import load
from moec.codegen.triton_operands import Operands
from moec.errors import BuildError, CodegenError
from moec.ir.dtypes import DTYPE_NAMES, DTYPES
from moec.runtime.bound import table_of
from moec.runtime.launch import Built, built, run
from moec.runtime.triton import TritonKernel, load_triton, rows_of

_MOST = 1024  # kinds of calls that one kernel remembers


@lru_cache(maxsize=1024)
def load_triton_backward(spec: str, device: torch.device) -> TritonBackward:
    """The kernels of a spec's gradients for tensors on `device`; raises as `load_triton` does."""
    return TritonBackward(load_triton(spec, device))


class TritonBackward:
    """The gradients of one spec on one device."""

    def __init__(self, forward: TritonKernel) -> None:
        self.forward, self.spec = forward, forward.spec
        self._programs: dict[tuple[object, ...], Built | BuildError] = {}
        self._unbuilt: BuildError | None = None
        load(forward.spec, backward=True)  # what cannot be generated is known before the first call

    def takes(self, grad: Tensor, x: Tensor, params: Sequence[Tensor]) -> bool:
        """Whether the dtypes are those of the spec; others (float64, say) are the twin's."""
        return grad.dtype == DTYPES[self.spec.y_dtype] and self.forward.takes(x, params)

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        params: Sequence[Tensor],
        needs: Sequence[bool],
        saved: Tensor | None = None,
        step: str = "",
        slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients by x, weights and each parameter, in their shapes and dtypes; empty where `needs` wants none.

        `saved`: what the forward kept, [T·k, F or 2F]; None: computed again. `step`: as `Wanted` has it, of calls that
        write (`last`) or read (`first`) the gradients by φ's inputs, `slopes` [T·k, F or 2F] in the order of experts.
        Raises BuildError in the second step too where the first one's kernels cannot be compiled.
        """
        x = rows_of(x)
        dparams = [p.new_empty(p.shape if n else (0,) * p.dim()) for p, n in zip(params, needs[2:], strict=True)]
        if x.numel() == 0 or experts.shape[1] == 0:
            return torch.zeros_like(x), torch.zeros_like(weights), [d.zero_() for d in dparams]
        bound = self.forward.bound(params)
        _, count, hidden, width, wide = bound.layout
        if x.shape[1] != hidden:
            raise CodegenError(f"x is {list(x.shape)}, but the experts' parameters want [T, {hidden}]")
        given = weights if weights.dtype in DTYPE_NAMES else weights.float()
        sizes = Sizes(x.shape[0], hidden, width, count, experts.shape[1], wide)
        dx, dweights = x.new_empty(x.shape), x.new_empty(weights.shape, dtype=torch.float32)
        groups, results = self._results(dparams, needs[2:])
        config = backward_config(self.forward.config_for(sizes))
        tensors = {"grad": grad.contiguous(), "x": x, "weights": given.contiguous(), "dx": dx, "dweights": dweights}
        tensors |= {"experts": experts.to(torch.int64).contiguous(), **bound.tensors, **results}
        tensors |= {} if saved is None else {"inputs": saved}
        tensors |= {} if slopes is None else {"dinputs": slopes}
        operands = self.forward.operands(x, bound, tensors)
        wanted = Wanted(needs[0], needs[1], groups, saved is not None or step == "first", step)
        made = self._program(sizes, config, operands, wanted, tensors)
        if step == "last" and isinstance(made, BuildError):
            self._unbuilt = made
        run(self._unbuilt if step == "first" and self._unbuilt else made, tensors)
        return (
            dx if needs[0] else x.new_empty(0),
            dweights.to(weights.dtype) if needs[1] else weights.new_empty(0),
            dparams,
        )

    def _program(
        self, sizes: Sizes, config: GpuConfig, operands: Operands, wanted: Wanted, tensors: Mapping[str, Tensor]
    ) -> Built | BuildError:
        kind = (sizes, config, operands, wanted)
        made = self._programs.get(kind)
        if made is None:
            if len(self._programs) >= _MOST:
                self._programs.clear()
            made = self._programs[kind] = self._make_program(*kind, tensors)
        return made

    def _make_program(
        self, sizes: Sizes, config: GpuConfig, operands: Operands, wanted: Wanted, tensors: Mapping[str, Tensor]
    ) -> Built | BuildError:
        def make(config: GpuConfig) -> Program:
            return backward_program(self.spec, sizes, config, operands, wanted)

        try:
            return built(load(self.spec, backward=True, tf32=config.tf32), make, config, tensors)
        except BuildError as error:
            return error

    def _results(self, dparams: list[Tensor], needs: Sequence[bool]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """The parameter groups of which any gradient is wanted, and by `d_` name where they are written."""
        names, each = self.spec.experts.param_groups, len(dparams) // len(self.spec.experts.param_groups)
        wanted: list[str] = []
        results: dict[str, Tensor] = {}
        for i, name in enumerate(names):
            mine = range(i * each, (i + 1) * each)
            if not any(needs[j] for j in mine):
                continue
            wanted.append(name)
            results[f"d_{name}"] = dparams[i] if self.spec.experts.stacked else self._table(dparams, needs, mine)
        return tuple(wanted), results

    @staticmethod
    def _table(dparams: list[Tensor], needs: Sequence[bool], mine: range) -> Tensor:
        """Where each expert's gradient is written; one that is not wanted is written and forgotten."""
        like = next(dparams[j] for j in mine if needs[j])
        return table_of([dparams[j] if needs[j] else torch.empty_like(like) for j in mine], keep=True)
