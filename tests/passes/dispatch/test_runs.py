"""Runs of sorted rows, and bodies of experts' own code, that are not what they seem: never a wrong answer."""

from __future__ import annotations

import pytest
import torch
from spellings_more import Layer, NormExpert

import moec

QUICK = {"rest": "eager"}
H = 16


class Base(Layer):
    def sorted(self, x):
        w, idx = self.route(x)
        flat = idx.reshape(-1)
        order = flat.argsort(stable=True)
        return w, idx, flat, order, x[order // self.k]

    def back(self, ys, order, w):
        return (torch.zeros_like(ys).index_copy(0, order, ys).view(*w.shape, -1) * w[..., None]).sum(1)


class ExpertsReversed(Base):
    def forward(self, x):
        w, _, flat, order, xs = self.sorted(x)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        ys = torch.cat([self.experts[-1 - i](c) for i, c in enumerate(xs.split(counts))])
        return self.back(ys, order, w)


class CountsOfOthers(Base):
    def forward(self, x):
        w, idx, _, order, xs = self.sorted(x)
        counts = torch.bincount(idx.flip(1).reshape(-1).clamp(max=2), minlength=self.num_experts).tolist()
        ys = torch.cat([expert(c) for expert, c in zip(self.experts, xs.split(counts), strict=True)])
        return self.back(ys, order, w)


class Descending(Base):
    def forward(self, x):
        w, idx = self.route(x)
        flat = idx.reshape(-1)
        order = flat.argsort(descending=True)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        chunks = x[order // self.k].split(counts)
        ys = torch.cat([expert(c) for expert, c in zip(self.experts, chunks, strict=True)])
        return self.back(ys, order, w)


class OneExpertLeftOut(Base):
    def forward(self, x):
        w, _, flat, order, xs = self.sorted(x)
        ends = torch.bincount(flat, minlength=self.num_experts).cumsum(0).tolist()
        ys = torch.zeros_like(xs)
        for e in range(1, self.num_experts):
            ys[ends[e - 1] : ends[e]] = self.experts[e](xs[ends[e - 1] : ends[e]])
        return self.back(ys, order, w)


class StartNotMoved(Base):
    """An expert that is skipped although it has rows leaves the running start where it was."""

    def forward(self, x):
        w, _, flat, order, xs = self.sorted(x)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        ys = torch.zeros_like(xs)
        start = 0
        for e, n in enumerate(counts):
            if n == 3:
                continue
            ys[start : start + n] = self.experts[e](xs[start : start + n])
            start += n
        return self.back(ys, order, w)


class StartBeforeTheSkip(Base):
    """The start moves on before the iteration ends early: that is right, and must stay so."""

    def forward(self, x):
        w, _, flat, order, xs = self.sorted(x)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        ys = torch.zeros_like(xs)
        end = 0
        for e, n in enumerate(counts):
            start = end
            end = start + n
            if n == 0:
                continue
            ys[start:end] = self.experts[e](xs[start:end])
        return self.back(ys, order, w)


class BodyReadsItsPlace(Layer):
    """The body reads the token's number, not only its row."""

    expert = NormExpert

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(idx == e)
            y.index_add_(0, t, expert(x[t]) * w[t, s, None] * t[:, None])
        return y


class BodySkipsAnExpert(Layer):
    expert = NormExpert

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(idx == e)
            if e == 1:
                continue
            y.index_add_(0, t, expert(x[t]) * w[t, s, None])
        return y


class AnotherSumBeside(Layer):
    """Two results of one loop."""

    expert = NormExpert

    def forward(self, x):
        w, idx = self.route(x)
        y, z = torch.zeros_like(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(idx == e)
            rows = expert(x[t])
            y.index_add_(0, t, rows * w[t, s, None])
            z.index_add_(0, t, rows * rows)
        return y + 0.1 * z


class Carried(Layer):
    """The sum is a new tensor at every turn."""

    expert = NormExpert

    def forward(self, x):
        w, idx = self.route(x)
        y = x * 0.5
        for e, expert in enumerate(self.experts):
            t, s = torch.where(idx == e)
            y = y.index_add(0, t, expert(x[t]) * w[t, s, None])
        return y * 2


FUSED = {StartBeforeTheSkip: 1, AnotherSumBeside: 1, Carried: 1}
FORMS = (
    ExpertsReversed,
    CountsOfOthers,
    Descending,
    OneExpertLeftOut,
    StartNotMoved,
    StartBeforeTheSkip,
    BodyReadsItsPlace,
    BodySkipsAnExpert,
    AnotherSumBeside,
    Carried,
)


def outputs_and_gradients(run, layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_right_whatever_is_done(form):
    torch.manual_seed(0)
    layer, x = form(), torch.randn(13, H)
    with torch.no_grad():
        report = moec.explain(layer, x, moec_options=QUICK)
    assert sum(s.status == "fused" for s in report.sites) == FUSED.get(form, 0), report
    torch._dynamo.reset()
    got = outputs_and_gradients(torch.compile(layer, backend="moec", options=QUICK), layer, x)
    want = outputs_and_gradients(layer, layer, x)
    for g, w in zip(got, want, strict=True):
        w = torch.zeros_like(g) if w is None and g is not None else w
        assert w is None or torch.allclose(g if g is not None else torch.zeros_like(w), w, atol=1e-4)
