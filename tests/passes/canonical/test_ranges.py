"""Ranges of whole numbers and masks: what they decide goes, what they do not decide stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moec.ir.graph import Ref
from moec.passes.canonical.canonicalize import Canonicalize
from moec.passes.canonical.ranges import ANYTHING, Ranges
from moec.passes.raising.vocabulary import raise_fx
from moec.pipeline import Facts

X = torch.randn(6, 4)


def raised(meaning, fn, *inputs):
    """A function's graph in canonical words."""
    return raise_fx(meaning.capture(fn, *inputs)[0]).graph


def canonical(meaning, fn, *inputs):
    """The words of a function's graph after the pass, in order."""
    graph = raised(meaning, fn, *inputs)
    return [i.word for i in Canonicalize().run(graph, Facts()).graph.instrs]


def chosen(x):
    return x.topk(2, dim=-1)[1]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.masked_fill((x > 0) & (chosen(x)[:, :1] >= 4), 0.0),
        lambda x: x.masked_fill(chosen(x)[:, :1] >= 4, 0.0),
        lambda x: x.masked_fill(chosen(x)[:, 1:].reshape(-1, 1).int() < 0, 0.0),
        lambda x: torch.where(chosen(x)[:, :1] < 4, x, 0.0),
        lambda x: torch.where(chosen(x)[:, :1] != 4, x, 0.0),
        lambda x: torch.where(~(chosen(x)[:, :1] == -1), x, 0.0),
        lambda x: torch.where(chosen(x)[:, :1].sort(dim=0)[0] <= 3, x, 0.0),
        lambda x: torch.where(x.argmax(-1)[:, None] < 4, x, 0.0),
        lambda x: torch.where((chosen(x)[:, :1] % 3 < 3) & (torch.arange(6)[:, None] < 6), x, 0.0),
        lambda x: torch.where((chosen(x)[:, :1] // 2 + 1 <= 2), x, 0.0),
        lambda x: torch.where(chosen(x)[:, :1].float() < 4.0, x, 0.0),
        lambda x: torch.where((chosen(x)[:, :1] + 1).bool(), x, 0.0),
    ],
)
def test_what_is_decided_goes(meaning, fn):
    words = canonical(meaning, fn, X)
    assert not {"where", "masked_fill"} & set(words), words


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.masked_fill(chosen(x)[:, :1] >= 3, 0.0),
        lambda x: torch.where(chosen(x)[:, :1] > 0, x, 0.0),
        lambda x: torch.where(chosen(x)[:, :1].bool(), x, 0.0),
        lambda x: torch.where((chosen(x)[:, :1] - 1) >= 0, x, 0.0),
        lambda x: torch.where((chosen(x)[:, :1] - 1).to(torch.uint8) >= 0, x, 0.0),
        lambda x: torch.where(((chosen(x)[:, :1] + 254).to(torch.uint8)) >= 254, x, 0.0),
        lambda x: torch.where(chosen(x)[:, :1] == 3, x, 0.0),
        lambda x: torch.where(x < float("inf"), x, 0.0),
        lambda x: torch.where(x.clamp(0, 1) <= 1, x, 0.0),
        lambda x: torch.where(torch.full((6, 1), 0.1) <= 0.1, x, 0.0),
        lambda x: x.masked_fill(chosen(x)[:, :1] >= 0, 0.0),
    ],
)
def test_what_is_not_decided_stays(meaning, fn):
    words = canonical(meaning, fn, X)
    assert {"where", "masked_fill", "eq"} & set(words), words


@pytest.mark.parametrize(("most", "left"), [(3, 0), (2, 1)])
def test_clamps(meaning, most, left):
    words = canonical(meaning, lambda x: chosen(x).clamp(max=most), X)
    assert words.count("clamp_max") == left


def test_an_update_that_changes_nothing_leaves_views(meaning):
    def fn(x):
        ids = chosen(x)
        flat = ids.view(-1)
        flat.clamp_(0, 3)
        return F.one_hot(ids, 4)

    assert canonical(meaning, fn, X) == ["topk", "one_hot"]


def test_inputs_can_be_anything(meaning):
    graph = raised(meaning, lambda ids: ids.reshape(-1).clamp(min=0), torch.arange(6))
    ranges = Ranges(graph)
    assert ranges.of(Ref(graph.inputs[0][0])) == ANYTHING
    assert ranges.of(Ref(graph.outputs[0])) == (0, float("inf"))
