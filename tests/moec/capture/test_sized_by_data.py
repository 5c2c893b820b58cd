"""Which functions may make as many numbers as data say: those that count or list rows, without loops."""

from __future__ import annotations

import ast

import pytest

from moec.capture.host import counts

ALLOWED = {
    "counts": "return torch.bincount(ids, minlength=4).cumsum(0)",
    "rows that are added": "t = mask.nonzero()[:, 0]; return y.index_add(0, t, x[t])",
}
OTHERS = {
    "a loop beside counts": "n = torch.bincount(ids)\n    for e in range(4): y = y + f(e)\n    return y * n",
    "a list beside counts": "return [f(e) for e in range(4)], torch.bincount(ids)",
    "rows that are not added": "return mask.nonzero()",
    "sums without rows": "return y.index_add(0, ids, x)",
    "nothing": "return x.relu()",
}


def function(body: str) -> ast.FunctionDef:
    (made,) = ast.parse(f"def forward(self, x, y, ids, mask):\n    {body}").body
    assert isinstance(made, ast.FunctionDef)
    return made


@pytest.mark.parametrize("body", ALLOWED.values(), ids=ALLOWED.keys())
def test_counts_and_rows_that_are_added(body):
    assert counts(function(body))


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS.keys())
def test_all_others_are_traced_as_they_are(body):
    assert not counts(function(body))
