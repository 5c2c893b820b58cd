"""A layer that is almost an MoE layer: moec leaves it as it is, the result is right, and the report says why."""

import torch
import torch.nn.functional as F
from torch import nn

import moec


class NeighbourMoE(nn.Module):
    """An expert reads its token and the one before: a row is not one token's, so no kernel fits."""

    def __init__(self, hidden=32, width=24, experts=4, top_k=2):
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.1)
        self.top_k = top_k

    def forward(self, x):
        weights, chosen = torch.topk(self.router(x).softmax(dim=-1), self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for i in range(self.up.shape[0]):
            token, slot = torch.where(chosen == i)
            rows = F.gelu(F.linear(x[token] - x[token - 1], self.up[i]))
            out.index_add_(0, token, F.linear(rows, self.down[i]) * weights[token, slot, None])
        return out


def make():
    """The target of `moec explain examples/03_explain_a_miss.py:make`."""
    torch.manual_seed(0)
    return NeighbourMoE(), (torch.randn(13, 32),)


def main():
    model, (x,) = make()
    with torch.no_grad():
        report = moec.explain(model, x)
        print(report)
        torch.testing.assert_close(torch.compile(model, backend="moec")(x), model(x), rtol=1e-4, atol=1e-5)
    print("\nnot fused, and still equal to eager")


if __name__ == "__main__":
    main()
