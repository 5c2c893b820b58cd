"""Under activation checkpointing a token's experts are chosen once, in forward, and backward takes that choice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from moec.backend import Backend
from moec.options import Options
from moec.report import Report

T, H, N, E, K = 13, 8, 12, 4, 2


class Layer(nn.Module):
    """Gathered weights; the router's weights are normalised in place."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, N, H) * 0.3), nn.Parameter(torch.randn(E, H, N) * 0.3)

    def forward(self, x):
        w, e = F.softmax(self.gate(x), -1).topk(K, -1)
        w /= w.sum(-1, keepdim=True)
        w = w * 1.5
        flat = e.reshape(-1)
        h = torch.bmm(self.up[flat], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        h = torch.bmm(self.down[flat], F.relu(h).unsqueeze(-1)).squeeze(-1)
        return (h * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class Block(nn.Module):
    """The layer in a checkpointed block."""

    def __init__(self):
        super().__init__()
        self.layer = Layer()

    def forward(self, x):
        return checkpoint(self.layer, torch.tanh(x), use_reentrant=False)


def step(run, model, x):
    """Output and gradients of one training step, and how often experts were chosen."""
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        y = run(x)
        y.square().sum().backward()
    chosen = sum(event.count for event in seen.key_averages() if event.key == "aten::topk")
    return [y.detach(), *(p.grad for p in model.parameters())], chosen


def compiled(rest):
    torch.manual_seed(0)
    model, report = Block(), Report()
    torch._dynamo.reset()
    options = Options.make({"rest": rest, "kernels": "eager", "proof": "off"})
    return model, torch.compile(model, backend=Backend(options, report=report)), report


def test_experts_are_chosen_once_in_a_training_step():
    model, run, report = compiled("aot_eager")
    x = torch.randn(T, H)
    want, twice = step(model, model, x)
    step(run, model, x)
    got, once = step(run, model, x)
    assert [site.status for site in report.sites] == ["fused"]
    assert (twice, once) == (2, 1)
    for ours, eager in zip(got, want, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rest", ["eager", "aot_eager"])
def test_backward_takes_the_choice_of_forward_whatever_the_router_says_by_then(rest):
    model, run, _ = compiled(rest)
    gate = model.layer.gate.weight.data
    gate.copy_(torch.tensor([2.0, 1.0, 0.0, 0.0]).unsqueeze(1).expand(E, H))
    y = run(torch.rand(T, H) + 0.5)
    gate.copy_(gate.flip(0))
    y.square().sum().backward()
    assert [bool(g.count_nonzero()) for g in model.layer.up.grad] == [True, True, False, False]
