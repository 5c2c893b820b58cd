"""One MoE layer in plain PyTorch, written three ways over the same parameters: what the demo and the doctor compile.

Router: softmax over E, top-k, weights renormalised. Expert: down(silu(gate(x)) * up(x)).
Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL = 1 << 22  # random numbers drawn; drawing each of 300 million weights anew would take most of the demo's time


class Experts(nn.Module):
    """E gated experts as two stacked parameters; `forward` is the loop over experts that have tokens."""

    def __init__(self, hidden: int, width: int, experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate_up = nn.Parameter(_random((experts, 2 * width, hidden), dtype), requires_grad=False)
        self.down = nn.Parameter(_random((experts, hidden, width), dtype), requires_grad=False)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], chosen i64[T, k], weights [T, k] → [T, H]."""
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, self.num_experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for row in hit:
            expert = row[0]
            slot, token = torch.where(mask[expert])
            gate, up = F.linear(x[token], self.gate_up[expert]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, self.down[expert])
            rows = rows * weights[token, slot, None]
            out.index_add_(0, token, rows.to(out.dtype))
        return out


class GroupedExperts(Experts):
    """The same experts on sorted rows and two grouped matrix products."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        k = chosen.shape[1]
        ids, order = chosen.reshape(-1).sort()
        ends = torch.searchsorted(ids, torch.arange(self.num_experts, device=x.device), right=True, out_int32=True)
        rows = x[order // k]
        gate, up = F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        rows = rows * weights.reshape(-1)[order, None]
        return torch.zeros_like(rows).index_copy_(0, order, rows).view(*chosen.shape, -1).sum(1).to(x.dtype)


class GatheredExperts(Experts):
    """The same experts on weights gathered for each (token, choice): good for a few tokens only."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        k = chosen.shape[1]
        flat = chosen.reshape(-1)
        rows = x.repeat_interleave(k, dim=0).unsqueeze(-1)
        gate, up = torch.bmm(self.gate_up[flat], rows).squeeze(-1).chunk(2, dim=-1)
        rows = torch.bmm(self.down[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (rows * weights.reshape(-1, 1)).view(*chosen.shape, -1).sum(1).to(x.dtype)


class MoE(nn.Module):
    """Router and experts. With `show_choice` the result is (y, chosen experts)."""

    def __init__(self, experts: Experts, gate: nn.Linear, top_k: int, show_choice: bool = False) -> None:
        super().__init__()
        self.experts = experts
        self.gate = gate
        self.top_k = top_k
        self.show_choice = show_choice

    def forward(self, x: Tensor) -> Any:
        """x [T, H] → [T, H]."""
        probabilities = F.softmax(self.gate(x), dim=-1, dtype=torch.float)
        weights, chosen = torch.topk(probabilities, self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        y = self.experts(x, chosen, weights)
        return (y, chosen) if self.show_choice else y


def make_moe(hidden: int, width: int, experts: int, top_k: int, dtype: torch.dtype) -> MoE:
    """A layer with cheap random weights: distinct for every expert, of the usual size."""
    gate = nn.Linear(hidden, experts, bias=False, dtype=dtype).requires_grad_(False)
    return MoE(Experts(hidden, width, experts, dtype), gate, top_k)


def with_experts(moe: MoE, form: type[Experts]) -> MoE:
    """The same layer, on the same parameters, in another form."""
    experts = form(1, 1, 1, moe.gate.weight.dtype)
    experts.num_experts = moe.experts.num_experts
    experts.gate_up, experts.down = moe.experts.gate_up, moe.experts.down
    return MoE(experts, moe.gate, moe.top_k)


def showing_choice(moe: MoE) -> MoE:
    """The same layer, returning the chosen experts too."""
    return MoE(moe.experts, moe.gate, moe.top_k, show_choice=True)


def _random(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Normal numbers of deviation 0.02 · a pool repeated from another place for each expert."""
    pool = torch.randn(POOL).mul_(0.02).to(dtype)
    size = shape[1] * shape[2]
    starts = torch.randint(POOL, (shape[0],)).tolist()
    out = torch.empty(shape[0], size, dtype=dtype)
    for row, start in zip(out, starts, strict=True):
        _fill(row, pool, start)
    return out.view(shape)


def _fill(row: Tensor, pool: Tensor, start: int) -> None:
    done = 0
    while done < row.numel():
        piece = pool[start : start + row.numel() - done]
        row[done : done + piece.numel()] = piece
        done, start = done + piece.numel(), 0
