"""Where gates may differ from zero: read off what fills them, or unknown."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moec.passes.dispatch.thresholds import support
from moec.passes.raising.vocabulary import raise_fx

LOW = float("-inf")
X = torch.randn(6, 4)


def kth(x):
    return x.topk(2, dim=-1).values[:, -1:]


def found(meaning, fn):
    """The mask of where gates may differ from zero, as the word that makes it and the word put around it."""
    graph = raise_fx(meaning.capture(fn, X)[0]).graph
    table = support(graph, graph.outputs[0])
    return None if table is None else (graph.defs[table.value].word, table.word)


@pytest.mark.parametrize(
    ("fn", "mask"),
    [
        (lambda x: F.relu(x), ("relu", "gt")),
        (lambda x: torch.where(x > 0.5, x, 0.0), ("gt", "")),
        (lambda x: x.masked_fill(x < kth(x), LOW).softmax(-1), ("lt", "invert")),
        (lambda x: (x.masked_fill(x < kth(x), -1e30) * 2.0).softmax(-1), ("lt", "invert")),
        (lambda x: torch.where(x < kth(x), torch.full_like(x, LOW), x).softmax(-1), ("lt", "invert")),
        (lambda x: torch.where(x >= kth(x), x, LOW).softmax(-1) / 2.0, ("ge", "")),
    ],
)
def test_a_mask_says_where_gates_are_not_zero(meaning, fn, mask):
    assert found(meaning, fn) == mask


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.softmax(-1),
        lambda x: x.masked_fill(x < kth(x), -5.0).softmax(-1),
        lambda x: (x.masked_fill(x < kth(x), LOW) * -1.0).softmax(-1),
        lambda x: (x.masked_fill(x < kth(x), -1e9) * 1e-9).softmax(-1),
        lambda x: x.masked_fill(x[:, :1] < 0, LOW).softmax(-1),
        lambda x: torch.where(x >= kth(x), x, x - 1e9).softmax(-1),
    ],
)
def test_nothing_says_that_gates_are_zero(meaning, fn):
    assert found(meaning, fn) is None
