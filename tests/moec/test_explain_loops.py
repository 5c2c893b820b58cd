"""`explain` names the loops over experts that stay as they are written, where a layer is not found."""

from __future__ import annotations

import torch
from torch import nn

import moec


class Returning(nn.Module):
    """The body looks at the sum that it adds to, so the loop is no sum of experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        w, idx = self.gate(x).softmax(-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(idx == e)
            y = y * 0.5
            y = y.index_add(0, t, expert(x[t]) * w[t, s, None])
        return y


def test_a_loop_that_cannot_be_rolled_is_named_with_its_line():
    with torch.no_grad():
        report = moec.explain(Returning(), torch.randn(7, 8), moec_options={"rest": "eager"})
    assert not report.complete
    (reason,) = report.not_rolled
    assert reason.predicate == "y changes from one iteration to the next in another way than by adding"
    assert reason.location == f"{__file__}:{Returning.forward.__code__.co_firstlineno + 3}"
