"""Loops that count their iterations by hand become `enumerate`; those that count something else do not."""

from __future__ import annotations

import ast
import textwrap

import pytest
import torch
from torch import nn

from moec.capture.counted import counted


def _counted(body: str) -> str:
    node = ast.parse("def f(xs, i, y):\n" + textwrap.indent(textwrap.dedent(body), "    ")).body[0]
    assert isinstance(node, ast.FunctionDef)
    return ast.unparse(ast.fix_missing_locations(counted(node)))


def test_place_by_hand():
    text = _counted("i = 0\nfor x in xs:\n    y[i] = x\n    i += 1\nreturn y")
    assert "for i, x in enumerate(xs):" in text
    assert "+= 1" not in text


@pytest.mark.parametrize(
    "body",
    [
        "i = 1\nfor x in xs:\n    y[i] = x\n    i += 1",
        "i = 0\nfor x in xs:\n    y[i] = x\n    i += 2",
        "i = 0\nfor x in xs:\n    if x: continue\n    y[i] = x\n    i += 1",
        "i = 0\nfor x in xs:\n    if x: break\n    y[i] = x\n    i += 1",
        "i = 0\nfor x in xs:\n    y[i] = x\n    i += 1\nreturn i",
        "i = 0\nfor x in xs:\n    i = i * 2\n    y[i] = x\n    i += 1",
        "for x in xs:\n    y[i] = x\n    i += 1",
        "i = 0\nwhile xs:\n    for x in xs:\n        y[i] = x\n        i += 1",
        "i = 0\nif y: i = 3\nfor x in xs:\n    y[i] = x\n    i += 1",
    ],
)
def test_left_as_written(body):
    assert "enumerate" not in _counted(body)


class Named(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.experts = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    def forward(self, x):
        idx, y, i = x.argmax(-1) % len(self.experts), torch.zeros_like(x), 0
        for name in self.experts:
            t = torch.where(idx == i)[0]
            y[t] += self.experts[name](x[t])
            i += 1  # noqa: SIM113  the form under test
        return y


class SaysNames(Named):
    def forward(self, x):
        idx, y = x.argmax(-1) % len(self.experts), torch.zeros_like(x)
        for i, name in enumerate(self.experts):
            t = torch.where(idx == i)[0]
            y[t] += self.experts[name](x[t]) * (2 if name.endswith("1") else 1)
        return y


@pytest.mark.parametrize("names", [["up", "down", "strange"], ["e1", "e0", "e2"]])
def test_names_of_any_kind_are_looked_up_at_their_places(names, recorder):
    model, x = Named(names), torch.randn(9, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 1


def test_names_that_are_read_are_no_places(recorder):
    model, x = SaysNames(["e0", "e1", "e2"]), torch.randn(9, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 0
    assert "something else with the names" in recorder.declined[0].reason
