"""Straight-through gates outside of training: what cancels goes, all other sums stay as they are."""

from __future__ import annotations

import pytest
import torch

from moec.passes.canonical.canonicalize import Canonicalize
from moec.passes.raising.vocabulary import raise_fx
from moec.pipeline import Facts

X = torch.randn(6, 4)


def canonical(meaning, fn):
    """The words of a function's graph after the pass, in order."""
    return [i.word for i in Canonicalize().run(raise_fx(meaning.capture(fn, X)[0]).graph, Facts()).graph.instrs]


def hard(soft):
    return torch.zeros_like(soft).scatter(-1, soft.topk(1, dim=-1).indices, 1.0)


GATES = {
    "hard - soft + soft": lambda p: hard(p) - p.detach() + p,
    "soft + (hard - soft)": lambda p: p + (hard(p) - p).detach(),
    "(hard - soft) twice": lambda p: hard(p) - p + p.detach() - p.detach() + p,
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_the_mask_is_left(meaning, gate):
    words = canonical(meaning, lambda x: gate(x.softmax(-1)))
    assert "scatter" in words
    assert not {"add", "sub"} & set(words)


OTHERS = {
    "soft counts once more": lambda p: hard(p) - p.detach() + p + p,
    "the mask counts twice": lambda p: hard(p) - p + p + hard(p),
    "a number": lambda p: hard(p) - p + p + 1.0,
    "no mask": lambda p: p.exp() - p + p,
    "of another value": lambda p: hard(p) - p.detach() + p.sqrt(),
}


@pytest.mark.parametrize("gate", OTHERS.values(), ids=OTHERS.keys())
def test_other_sums_stay(meaning, gate):
    assert {"add", "sub"} & set(canonical(meaning, lambda x: gate(x.softmax(-1))))


def test_sums_of_sums_are_not_walked_again_and_again(meaning):
    """2^60 terms; and a long chain."""

    def doubled(x):
        for _ in range(60):
            x = x + x
        return x

    def long(x):
        for _ in range(400):
            x = x + x.abs()
        return x

    assert canonical(meaning, doubled).count("add") == 60
    assert canonical(meaning, long).count("add") == 400
