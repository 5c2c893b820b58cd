"""Models whose experts ranks_job.py spreads over ranks."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

H, WIDTH = 16, 12


class Layer(nn.Module):
    """Experts as stacked tensors in a loop, each gated; what the router gives is softmaxed and renormalised."""

    def __init__(self, experts=6, k=2):
        super().__init__()
        self.k, self.gate = k, nn.Linear(H, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * WIDTH, H) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, H, WIDTH) * 0.3)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e in range(self.up.shape[0]):
            rows, slots = torch.where(ids == e)
            a, b = F.linear(x[rows], self.up[e]).chunk(2, -1)
            y.index_add_(0, rows, F.linear(F.silu(a) * b, self.down[e]) * weights[rows, slots, None])
        return y


class Own(nn.Module):
    """Experts with code of their own."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.LayerNorm(H), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == e)
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return y


class Deep(nn.Module):
    """Two layers, the second in a checkpointed block."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(), Layer(5, 3)

    def forward(self, x):
        x = x + self.first(x)
        return x + checkpoint(self.second, x, use_reentrant=False)
