"""Layers whose rewrites are proved, and near ones whose rewrites must not be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moec.runtime import ops as runtime  # noqa: F401  # registers the ops

T, H, N, E, K = 13, 8, 12, 4, 2


class Layer(nn.Module):
    """Routing, and stacked or separate experts, for spellings that read `self`."""

    def __init__(self, h=H, n=N, experts=E):
        super().__init__()
        self.gate = nn.Linear(h, experts, bias=False)
        self.up, self.down = (
            nn.Parameter(torch.randn(experts, n, h) * 0.3),
            nn.Parameter(torch.randn(experts, h, n) * 0.3),
        )

    def route(self, x):
        w, e = F.softmax(self.gate(x), -1).topk(K, -1)
        return w / w.sum(-1, keepdim=True), e


class Loop(Layer):
    def forward(self, x):
        w, e = self.route(x)
        y = torch.zeros_like(x)
        for i in range(E):
            token, slot = torch.where(e == i)
            h = F.linear(F.relu(F.linear(x[token], self.up[i])), self.down[i])
            y.index_add_(0, token, h * w[token, slot, None])
        return y


class SkippingLoop(Layer):
    """Expert 2 is left out when it has many rows."""

    def forward(self, x):
        w, e = self.route(x)
        y = torch.zeros_like(x)
        for i in range(E):
            mask = (e == i).any(-1)
            if mask.sum() > 5:
                continue
            weight = (w * (e == i)).sum(-1)
            h = F.linear(F.relu(F.linear(x[mask], self.up[i])), self.down[i])
            y[mask] += weight[mask].unsqueeze(-1) * h
        return y


class Gathered(Layer):
    def rows(self, x, e):
        return x.repeat_interleave(K, dim=0)

    def forward(self, x):
        w, e = self.route(x)
        flat = e.reshape(-1)
        h = torch.bmm(self.up[flat], self.rows(x, e).unsqueeze(-1)).squeeze(-1)
        h = torch.bmm(self.down[flat], F.relu(h).unsqueeze(-1)).squeeze(-1)
        return (h * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class Dense(Layer):
    rest = 0.0

    def forward(self, x):
        w, e = self.route(x)
        gates = torch.full((x.shape[0], E), self.rest).scatter(1, e, w)
        h = torch.bmm(x.repeat(E, 1).view(E, -1, H), self.up.transpose(1, 2))
        h = torch.bmm(F.relu(h), self.down.transpose(1, 2))
        return (h * gates.t().reshape(E, -1, 1)).sum(0)


class DenseRest(Dense):
    """Experts that nobody chose count too."""

    rest = 0.1


class Smallest(Loop):
    """The experts with the lowest scores."""

    def route(self, x):
        return F.softmax(self.gate(x), -1).topk(K, -1, largest=False)


class OverTokens(Loop):
    """Scores that are normalised over tokens."""

    def route(self, x):
        return F.softmax(self.gate(x), 0).topk(K, -1)


class Sorted(Layer):
    """Rows in expert order; `back` undoes the order, or does not."""

    def back(self, order):
        return order.argsort()

    def forward(self, x):
        w, e = self.route(x)
        flat = e.reshape(-1)
        order = flat.argsort(stable=True)
        h = torch.bmm(self.up[flat[order]], x[order // K].unsqueeze(-1)).squeeze(-1)
        h = torch.bmm(self.down[flat[order]], F.relu(h).unsqueeze(-1)).squeeze(-1)
        h = h * w.reshape(-1)[order].unsqueeze(-1)
        return h[self.back(order)].view(-1, K, H).sum(1)


class SortedOnce(Sorted):
    def back(self, order):
        return order


class Rotated(Loop):
    """Chosen by code that may choose one expert twice: dense gates would then keep one of the two weights."""

    def route(self, x):
        w, _ = F.softmax(self.gate(x), -1).topk(K, -1)
        return w, torch.stack([self.gate(x).argmax(-1), self.gate(x).argmin(-1)], -1)


class DenseRotated(Dense):
    route = Rotated.route
