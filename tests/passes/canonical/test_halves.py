"""Gate and up on an axis of their own: one product with the matrix that holds both; other axes stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moec.passes.canonical.canonicalize import Canonicalize
from moec.passes.raising.vocabulary import raise_fx
from moec.pipeline import Facts

X, IDS = torch.randn(6, 4), torch.randint(0, 3, (6, 2))


def products(meaning, fn, *inputs):
    """The shapes of the matrices that products read after the pass."""
    graph = Canonicalize().run(raise_fx(meaning.capture(fn, *inputs)[0]).graph, Facts()).graph
    return [tuple(map(int, graph.types[i.args[1].name].shape)) for i in graph.instrs if i.word == "contract"]


@pytest.mark.parametrize(
    ("fn", "shape", "read"),
    [
        (lambda x, ids, w: torch.einsum("th,tkdfh->tkdf", x, w[ids])[:, :, 1], (3, 2, 5, 4), (6, 2, 10, 4)),
        (lambda x, ids, w: torch.einsum("th,tkhdf->tkdf", x, w[ids])[:, :, 0], (3, 4, 2, 5), (6, 2, 4, 10)),
        (lambda x, ids, w: torch.einsum("th,edfh->dtef", x, w)[1], (3, 2, 5, 4), (3, 10, 4)),
        (lambda x, ids, w: torch.einsum("th,tdfh->tdf", x, w[ids[:, 0]]), (3, 2, 5, 4), (6, 10, 4)),
    ],
)
def test_one_matrix_holds_both(meaning, fn, shape, read):
    assert products(meaning, fn, X, IDS, torch.randn(shape)) == [read]


@pytest.mark.parametrize(
    ("fn", "shape", "read"),
    [
        (lambda x, ids, w: torch.einsum("th,tkdfh->tkdf", x, w[ids]), (3, 3, 5, 4), (6, 2, 3, 5, 4)),
        (lambda x, ids, w: torch.einsum("th,efh->tef", x, w), (2, 5, 4), (2, 5, 4)),
        (lambda x, ids, w: F.linear(x, w[1, 0]), (3, 2, 5, 4), (5, 4)),
    ],
)
def test_other_axes_stay(meaning, fn, shape, read):
    assert products(meaning, fn, X, IDS, torch.randn(shape)) == [read]
