"""A loop that reads what it has just written stays one loop: its first sum is not taken out of it."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled
from torch import nn

H, WIDTH, O, E = 16, 24, 6, 4


class Scaled(nn.Module):
    """Each expert's rows are written, then read back, scaled by the expert's own numbers, and written again."""

    def __init__(self, norm=True):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E)
        middle = [nn.LayerNorm(WIDTH)] if norm else []
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, WIDTH), *middle, nn.GELU(), nn.Linear(WIDTH, O)) for _ in range(E)
        )
        self.scale = nn.Parameter(torch.rand(E, O))

    def forward(self, x):
        idx = self.gate(x).argmax(-1)
        y = torch.zeros(x.shape[0], O)
        for e in range(E):
            mask = idx == e
            if mask.any():
                y[mask] = self.experts[e](x[mask])
                y[mask] = y[mask] * self.scale[e].unsqueeze(0)
        return y


class Totals(Scaled):
    """The sum so far is read after each expert."""

    def forward(self, x):
        idx = self.gate(x).argmax(-1)
        y, seen = torch.zeros(x.shape[0], O), torch.zeros(O)
        for e in range(E):
            mask = idx == e
            if mask.any():
                y[mask] += self.experts[e](x[mask])
                seen = seen + y.sum(0)
        return y + seen


@pytest.mark.parametrize("norm", [True, False], ids=["own-code", "mlp"])
@pytest.mark.parametrize("kind", [Scaled, Totals])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_what_is_read_back_is_what_the_loop_wrote(kind, norm, tokens):
    module, x = kind(norm), torch.randn(tokens, H)
    run, report = compiled(module, kernels="eager")
    with torch.no_grad():
        torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)
    assert all(site.status == "declined" for site in report.sites), report


@pytest.mark.parametrize("kind", [Scaled, Totals])
def test_gradients(kind):
    module, x = kind(), torch.randn(13, H)
    run, _ = compiled(module, kernels="eager")
    loss, names = torch.randn(13, O), list(module.experts.parameters())
    want = torch.autograd.grad((module(x) * loss).sum(), names)
    for got, wanted in zip(torch.autograd.grad((run(x) * loss).sum(), names), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


class Given(nn.Module):
    """Choices that are handed over: a token that has an expert twice gets one of its two rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, WIDTH), nn.GELU(), nn.Linear(WIDTH, H)) for _ in range(E)
        )

    def forward(self, x, weights, idx):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(idx == e)
            y[token] += weights[token, slot, None] * expert(x[token])
        return y


class Summed(Given):
    """The same by index_add, which adds both rows."""

    def forward(self, x, weights, idx):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(idx == e)
            y.index_add_(0, token, weights[token, slot, None] * expert(x[token]))
        return y


@pytest.mark.filterwarnings("error:moec. the layer")
@pytest.mark.parametrize(("kind", "status"), [(Given, "declined"), (Summed, "fused")])
def test_choices_of_which_nothing_is_known(kind, status):
    module = kind()
    inputs = torch.randn(13, H), torch.rand(13, 2), torch.randint(0, E, (13, 2))
    run, report = compiled(module, kernels="eager")
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)
    assert [site.status for site in report.sites] == [status], report
    if status == "declined":
        assert "twice" in str(report), report
