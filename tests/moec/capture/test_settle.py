"""A bug of moec's own while it rolls what Dynamo wrote out leaves the loop as it was written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moec.capture import settle


class Chunks(nn.Module):
    """Sorted rows, cut by numbers that a method moves to the host and keeps."""

    def __init__(self, experts=3, hidden=8):
        super().__init__()
        self.gate = nn.Linear(hidden, experts)
        self.experts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(experts))

    def forward(self, x):
        ids = self.gate(x).argmax(-1)
        order = ids.argsort(stable=True)
        self.sizes = torch.bincount(ids, minlength=len(self.experts)).tolist()
        chunks = x[order].split(self.sizes)
        rows = torch.cat([f(chunk) for f, chunk in zip(self.experts, chunks, strict=True)])
        return torch.zeros_like(x).index_copy(0, order, rows)


def test_an_error_while_rolling_is_said_and_the_model_runs(recorder, monkeypatch):
    def wrong(*_):
        raise ZeroDivisionError("not this one")

    monkeypatch.setattr(settle, "roll_chunks", wrong)
    model, x = Chunks(), torch.randn(7, 8)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="left as it was written: internal error: ZeroDivision"):
        y = torch.compile(model, backend=recorder)(x)
    assert torch.equal(y, model(x))
    assert recorder.anchors == 0
