"""Layers beside what torch.func transforms are fused, with equal outputs and gradients; those inside are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from torch import nn

H, WIDTH, E, T = 8, 12, 4, 13


class Layer(nn.Module):
    """Two experts a token, gathered."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, WIDTH, H) * 0.3)
        self.down = nn.Parameter(torch.randn(E, H, WIDTH) * 0.3)

    def experts(self, x):
        w, idx = self.gate(x).softmax(-1).topk(2, dim=-1)
        h = F.silu(torch.einsum("th,tkfh->tkf", x, self.up[idx]))
        return torch.einsum("tkf,tkhf,tk->th", h, self.down[idx], w)


class Beside(Layer):
    """A mask that vmap makes of positions, as attention's are made; a mean of each row; then experts."""

    def forward(self, x):
        places = torch.arange(x.shape[0])
        after = torch.vmap(torch.vmap(lambda q, k: k <= q, (None, 0)), (0, None))(places, places)
        x = x + torch.vmap(lambda row: row - row.mean())(x)
        return self.experts((x @ x.T).masked_fill(~after, 0) @ x / T) + after.sum(-1, keepdim=True)


class Updates(Layer):
    """A transform that changes its rows in place."""

    def forward(self, x):
        return self.experts(torch.vmap(lambda row: row.clone().mul_(2).add_(row.sum()))(x))


class Inside(Layer):
    """The layer itself, and the same inside of grad."""

    def forward(self, x):
        slope = torch.func.grad(lambda given: self.experts(given).square().sum())(x)
        return self.experts(x) + slope


@pytest.mark.parametrize(
    ("make", "status"),
    [(Beside, ["fused"]), (Updates, []), (Inside, ["fused"])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layers_beside_a_transform_are_fused(make, status):
    model, x = make(), torch.randn(T, H)
    run, report = compiled(model, kernels="eager")
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert report.graphs == 1
    assert [site.status for site in report.sites] == status, report
    assert any("torch.func" in note for note in report.graph_reports[0].notes)


def test_gradients_beside_a_transform():
    model, x = Beside(), torch.randn(T, H, requires_grad=True)
    run, report = compiled(model, kernels="eager")
    loss, names = torch.randn(T, H), [x, *model.parameters()]
    want = torch.autograd.grad((model(x) * loss).sum(), names)
    for got, wanted in zip(torch.autograd.grad((run(x) * loss).sum(), names), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    assert [site.status for site in report.sites] == ["fused"]
