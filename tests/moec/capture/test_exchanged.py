"""Experts whose tensors the compiled code exchanges before it loops over them: the loop sees the new ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

T, H, F, E = 13, 8, 12, 4


class Experts(nn.Module):
    """A loop over modules."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, F), nn.ReLU(), nn.Linear(F, H)) for _ in range(E))

    def forward(self, x):
        best, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e in range(E):
            (t,) = torch.where(chosen == e)
            y[t] += best[t, None] * self.experts[e](x[t])
        return y


class Matrices(Experts):
    """A loop over parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList(torch.randn(H, H) for _ in range(E))

    def forward(self, x):
        best, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e in range(E):
            (t,) = torch.where(chosen == e)
            y[t] += best[t, None] * torch.relu(x[t] @ self.experts[e])
        return y


def called_with(model, names):
    """A function of new tensors in place of those whose names begin so."""
    return lambda tensors, x: functional_call(model, {n: t for n, t in tensors.items() if n.startswith(names)}, (x,))


@pytest.mark.parametrize("model", [Experts, Matrices])
@pytest.mark.parametrize("names", ["", "experts", "experts.2", "gate"])
def test_functional_call(model, names, recorder):
    model = model()
    tensors = {name: (p * 1.5).requires_grad_() for name, p in model.state_dict().items()}
    call, x = called_with(model, names), torch.randn(T, H)
    wanted = call(tensors, x)
    given = torch.compile(call, backend=recorder)(tensors, x)
    assert recorder.anchors == 1
    assert len(recorder.graphs) == 1
    torch.testing.assert_close(given, wanted)
    used = [t for name, t in tensors.items() if name.startswith(names)]
    for got, want in zip(
        torch.autograd.grad(given.square().sum(), used),
        torch.autograd.grad(wanted.square().sum(), used),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_experts_that_become_unlike_stay_a_loop(recorder):
    model = Experts()
    tensors = {"experts.2.0.weight": torch.randn(H, F).t()[:, :H].double().float().to(torch.bfloat16)}
    call = torch.compile(called_with(model, "experts"), backend=recorder)
    with pytest.raises(Exception, match="dtype"):  # as in eager: a product of two dtypes
        call(tensors, torch.randn(T, H))
    assert recorder.anchors == 0


class Rescaled(Experts):
    """Writes to an attribute of one expert before the loop."""

    def forward(self, x):
        self.experts[1][1].inplace = True
        return super().forward(x)


def test_attributes_written_before_the_loop(recorder):
    model, x = Rescaled(), torch.randn(T, H)
    given = torch.compile(model, backend=recorder)(x)
    assert recorder.anchors == 0
    torch.testing.assert_close(given, model(x))
