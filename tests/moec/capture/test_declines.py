"""Loops that must stay as written: they run unrolled or with graph breaks, with a reason, and with eager's results."""

from __future__ import annotations

import ast
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moec.capture import install
from moec.capture.events import loops
from moec.capture.host import scope_of
from moec.capture.recognise import Candidate, Declined, examine


class Base(nn.Module):
    def __init__(self, experts=3, hidden=8):
        super().__init__()
        self.num_experts = experts
        self.gate = nn.Linear(hidden, experts)
        self.experts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(experts))

    def choose(self, x):
        return self.gate(x).argmax(-1)


class Loop(Base):
    def forward(self, x):
        idx, y = self.choose(x), torch.zeros_like(x)
        for e in range(self.num_experts):
            t = torch.where(idx == e)[0]
            y.index_add_(0, t, self.experts[e](x[t]))
        return y


class BreaksTheGraph(Base):
    def forward(self, x):
        idx, y = self.choose(x), torch.zeros_like(x)
        for e in range(self.num_experts):
            t = torch.where(idx == e)[0]
            torch._dynamo.graph_break()
            y.index_add_(0, t, self.experts[e](x[t]))
        return y


class AsksForASize(Base):
    def forward(self, x):
        idx, y = self.choose(x), torch.zeros_like(x)
        for e in range(self.num_experts):
            t = torch.where(idx == e)[0]
            rows = x[t] if t.shape[0] < 3 else x[t] * 2
            y.index_add_(0, t, self.experts[e](rows))
        return y


class SkipsIdle(Base):
    def forward(self, x):
        idx, y = self.choose(x), torch.zeros_like(x)
        for e in range(self.num_experts):
            t = torch.where(idx == e)[0]
            if t.numel():
                y.index_add_(0, t, self.experts[e](x[t]))
        return y


class AsksBehindTheLoop(SkipsIdle):
    """What stands behind the loop has nothing to do with it, and branches on a size that only data decides."""

    def forward(self, x):
        y = super().forward(x)
        rows = (y > 0).nonzero()
        if rows.numel():
            y = y + len(rows)
        return y[: int((y > 1).sum())]


class Layers(Base):
    """A loop over layers: each reads what the last one wrote."""

    def forward(self, x):
        for i, layer in enumerate(self.experts):
            keep = torch.where(x.sum(-1) == i)[0]
            x = F.relu(layer(x))
            x[keep] += 1
        return x


class LastUsed(Base):
    def forward(self, x):
        idx, y = self.choose(x), torch.zeros_like(x)
        for e in range(self.num_experts):
            t = torch.where(idx == e)[0]
            out = self.experts[e](x[t])
            y.index_add_(0, t, out)
        return y + out.sum()


class ComparesTheExpert(Base):
    def forward(self, x):
        idx, y = self.choose(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t = torch.where(idx == e)[0]
            y.index_add_(0, t, expert(x[t]) * (1 + (expert == e)))
        return y


def test_an_expert_that_is_compared_with_its_number(recorder):
    model, x = ComparesTheExpert(), torch.randn(6, 8)
    torch.testing.assert_close(torch.compile(model, backend=recorder)(x), model(x))


def test_graph_break_in_the_body(recorder):
    model, x = BreaksTheGraph(), torch.randn(6, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 0


def test_decision_on_a_size(recorder):
    model, x = AsksForASize(), torch.randn(6, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 0


def test_break_in_an_inner_frame(recorder):
    model, x = nn.Sequential(nn.Linear(8, 8), BreaksTheGraph(), Loop()), torch.randn(6, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 1  # of the last, which has nothing against it


def test_truth_of_a_size_in_a_loop_as_written(recorder):
    model, x = SkipsIdle(), torch.randn(6, 8)
    _wider(model)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 0


def test_truth_of_a_size_behind_a_loop(recorder):
    model, x = AsksBehindTheLoop(), torch.randn(6, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 1


@pytest.mark.parametrize("model", [Layers(), LastUsed()], ids=lambda m: type(m).__name__)
def test_source_forbids(model, recorder):
    x = torch.randn(6, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 0


def _wider(model):
    model.experts[1] = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))


def _without_bias(model):
    model.experts[1] = nn.Linear(8, 8, bias=False)


def _frozen(model):
    model.experts[1].weight.requires_grad_(False)


def _hooked(model):
    model.experts[1].register_forward_hook(lambda module, args, out: out * 2)


def _marked(model):
    model.experts[1].rank = 1


def _in_eval(model):
    model.experts[1].eval()


@pytest.mark.parametrize("change", [_wider, _without_bias, _frozen, _hooked, _marked, _in_eval])
def test_experts_that_differ(change, recorder):
    model, x = Loop(), torch.randn(6, 8)
    change(model)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    # What no line of the forward asks for makes no difference in what Dynamo wrote out, which is rolled again.
    assert recorder.anchors == (change in (_marked, _in_eval))
    assert "expert 1" in recorder.declined[0].reason
    assert recorder.declined[0].file == __file__


def verdicts(body):
    code = "def f(self, x, idx, y, n):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    function = ast.parse(code).body[0]
    assert isinstance(function, ast.FunctionDef)
    return [examine(loop, path, scope_of(function)) for loop, path in loops(function)]


PLAIN = """
for e in range(n):
    t = torch.where(idx == e)[0]
    y[t] += self.experts[e](x[t])
    {}
return y
"""


def test_plain_loop_is_a_candidate():
    assert isinstance(verdicts(PLAIN.format("pass"))[0], Candidate)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("break", "breaks out"),
        ("return y", "return"),
        ("self.count = e", "sets the attribute self.count"),
        ("seen.append(t)", "seen.append"),
        ("x = x * y.sum()", "x changes"),
        ("z = y.sum()", "y is read in the body"),
    ],
)
def test_reasons(line, reason):
    verdict = verdicts(PLAIN.format(line))[0]
    assert isinstance(verdict, Declined)
    assert reason in verdict.reason


@pytest.mark.parametrize(
    "body",
    [
        "for layer in self.layers:\n    x = layer(x)\nreturn x",
        "for i in range(n):\n    y[i] += self.layers[i](x)\nreturn y",
        "for i in range(n):\n    if i == 3:\n        x = x * 2\n    x = self.layers[i](x)\nreturn x",
        "for row in idx:\n    y.index_add_(0, idx, x)\nreturn y",
    ],
)
def test_no_loop_over_experts(body):
    assert verdicts(body) == [None]


def test_without_source():
    scope = {"nn": nn, "torch": torch}
    exec(
        "class Made(nn.Module):\n  def forward(self, x):\n    y = x * 0\n    for e in range(3):\n"
        "      y[torch.where(x == e)[0]] += 1\n    return y\n",
        scope,
    )
    install.install_class(scope["Made"])
    assert any("source" in d.reason for d in install.declined())
