"""The demo's proof: moec's result and choice of experts against eager and an fp32 reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.demo.forms import MoE, showing_choice

# Relative error of the whole result. A dtype's own rounding of inputs, products and sums stays below these.
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Checked:
    """One token count: relative errors against fp32, and how many tokens chose the same experts as eager.

    A token may differ where two experts' probabilities are equal up to rounding (`ties`); nothing else may.
    eager_error is None where eager takes too long on this host.
    """

    tokens: int
    error: float
    eager_error: float | None
    tolerance: float
    same_choice: int
    ties: int

    @property
    def equal(self) -> bool:
        """Right up to rounding, with the same experts."""
        return self.error <= self.tolerance and self.same_choice + self.ties == self.tokens


def check(model: MoE, inputs: Mapping[int, Tensor], affordable: Callable[[int], bool]) -> tuple[Checked, ...]:
    """Compile the layer so that it shows its choice, and compare for every token count."""
    compiled = torch.compile(showing_choice(model), backend="moec")
    results: list[Checked] = []
    for tokens, x in inputs.items():
        y, chosen = compiled(x)
        eager = model(x) if affordable(tokens) else None
        same, ties = _choices(model, x, chosen)
        exact = reference(model, x, chosen)
        eager_error = None if eager is None else relative_error(eager, exact)
        results.append(Checked(tokens, relative_error(y, exact), eager_error, TOLERANCE[x.dtype], same, ties))
    return tuple(results)


def _choices(model: MoE, x: Tensor, chosen: Tensor) -> tuple[int, int]:
    """Tokens whose experts are eager's own, in the same order; and tokens that differ only among equal scores."""
    scores = F.softmax(model.gate(x), dim=-1, dtype=torch.float)
    best, eager = torch.topk(scores, model.top_k, dim=-1)
    same = (eager == chosen).all(dim=-1)
    # Logits are rounded to x's dtype: one unit there is this much of a probability.
    near = (scores.gather(-1, chosen) - best).abs() <= 4 * torch.finfo(x.dtype).eps * best * model.gate(x).abs().amax(
        -1, True
    )
    return int(same.sum()), int((near.all(dim=-1) & ~same).sum())


def reference(model: MoE, x: Tensor, chosen: Tensor) -> Tensor:
    """The layer in fp32 for the experts chosen [T, k]; an expert's weights are widened only while it is at work."""
    scores = F.softmax(model.gate(x), dim=-1, dtype=torch.float).gather(-1, chosen)
    weights = (scores / scores.sum(-1, keepdim=True)).to(x.dtype).float()
    wide = x.float()
    out = torch.zeros_like(wide)
    for expert in chosen.unique().tolist():
        token, slot = torch.where(chosen == expert)
        gate, up = F.linear(wide[token], model.experts.gate_up[expert].float()).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, model.experts.down[expert].float())
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


def relative_error(y: Tensor, exact: Tensor) -> float:
    """‖y − exact‖ / ‖exact‖ in fp32; inf for anything not finite."""
    difference = float((y.float() - exact).norm() / exact.norm().clamp_min(1e-30))
    return difference if torch.isfinite(y).all() else float("inf")
