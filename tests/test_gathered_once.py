"""Weights gathered for one expert a token, whose sum is a view: the last view of it is what is replaced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from test_spellings_more import assert_close, assert_same_call, compiled, gradients
from torch import nn

H, N, E = 8, 12, 4


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2 * N, H) * 0.3)
        self.down = nn.Parameter(torch.randn(E, H, N) * 0.3)

    def forward(self, inputs):
        x = inputs.view(-1, H)
        w, ids = self.gate(x).softmax(-1).topk(1, dim=-1)
        flat, rows = ids.reshape(-1), x.repeat_interleave(1, dim=0)
        a, b = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        h = torch.bmm(self.down[flat], (F.silu(a) * b).unsqueeze(-1)).squeeze(-1) * w.reshape(-1, 1)
        return h.view(-1, 1, H).sum(1).view(inputs.shape)


def test_it_is_fused_and_equal():
    torch.manual_seed(0)
    module = Once()
    run, report = compiled(module)
    for shape in ((1, 7, H), (2, 13, H), (1, 1, H)):
        x = (torch.randn(shape),)
        with torch.no_grad():
            assert_same_call(run, module, x)
        assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)
    assert {s.status for s in report.sites} == {"fused"}, report
