"""Compile an MoE layer written as a plain loop over its experts, and compare it with eager."""

import torch
import torch.nn.functional as F
from torch import nn


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self, hidden, width):
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """Top-k routing over a ModuleList of experts: nothing here knows moec."""

    def __init__(self, hidden=64, width=48, experts=8, top_k=2):
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, width) for _ in range(experts))
        self.top_k = top_k

    def forward(self, x):
        weights, chosen = torch.topk(self.router(x).softmax(dim=-1), self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def make():
    """The target of `moec explain examples/01_compile.py:make`."""
    torch.manual_seed(0)
    return MoE(), (torch.randn(13, 64),)


def main():
    model, (x,) = make()
    with torch.no_grad():
        compiled = torch.compile(model, backend="moec")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    print("equal to eager")

    # Training works the same: gradients flow through the compiled layer.
    compiled = torch.compile(model, backend="moec")
    compiled(x).square().mean().backward()
    print("gradient of the router:", f"{model.router.weight.grad.norm():.4f}")


if __name__ == "__main__":
    main()
