"""Loops over experts whose mask has axes of size 1: a batch of one, one token each, and the one slot of a token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from torch import nn

H, WIDTH, E = 16, 24, 4


class Experts(nn.Module):
    """A loop over the experts that a mask [E, slots, T] names."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, WIDTH, H) * 0.3)
        self.down = nn.Parameter(torch.randn(E, H, WIDTH) * 0.3)

    def loop(self, x, mask, weights):
        y = torch.zeros_like(x)
        for e in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            h = F.linear(F.relu(F.linear(x[token], self.up[e[0]])), self.down[e[0]])
            y.index_add_(0, token, h * weights[token, slot, None])
        return y


class OneExpert(Experts):
    """One expert a token; tokens on two axes are joined behind the mask, whose slots are an axis of size 1."""

    def __init__(self, capacity=0):
        super().__init__()
        self.capacity = capacity

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        mask = F.one_hot(scores.argmax(-1), num_classes=E)
        if self.capacity:
            mask = mask * (torch.cumsum(mask, dim=-2) <= self.capacity)
        weights = scores.max(-1).values.view(-1, 1)
        return self.loop(x.reshape(-1, H), mask.view(-1, 1, E).permute(2, 1, 0), weights).view(x.shape)


class FirstSlotsWeight(Experts):
    """Two experts a token in one mask: its axis of size 1 is no slot, both have the first one's weight."""

    def forward(self, x):
        x = x.reshape(-1, H)
        weights, idx = self.gate(x).softmax(-1).topk(2, dim=-1)
        mask = F.one_hot(idx, num_classes=E).sum(1)
        return self.loop(x, mask.view(-1, 1, E).permute(2, 1, 0), weights)


def answers(model, x):
    """The model's and the compiled model's output and gradients, and how its layers fared."""
    run, report = compiled(model, kernels="eager")
    pairs = []
    for call in (model, run):
        model.zero_grad()
        y = call(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        zero = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        pairs.append([y.detach(), *zero])
    return pairs, [site.status for site in report.sites]


@pytest.mark.parametrize("capacity", [0, 2, 64])
@pytest.mark.parametrize("shape", [(2, 13), (1, 13), (13, 1), (13, 2), (1, 1)], ids=str)
def test_one_expert_a_token_on_two_axes(shape, capacity):
    torch.manual_seed(0)
    pairs, status = answers(OneExpert(capacity), torch.randn(*shape, H))
    assert status == ["fused"]
    for want, got in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 13), (1, 13), (1, 1)], ids=str)
def test_an_axis_of_size_1_is_no_slot_where_a_token_has_two(shape):
    torch.manual_seed(0)
    pairs, status = answers(FirstSlotsWeight(), torch.randn(*shape, H))
    assert status == ["declined"]
    for want, got in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
