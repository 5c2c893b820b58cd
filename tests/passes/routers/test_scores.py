"""A router's score is any pointwise function of its logits, or of their softmax: read as an expression, and right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moec.backend import Backend
from moec.ir.spec import KernelSpec
from moec.options import Options
from moec.report import Report

T, H, N, E, K = 13, 8, 8, 5, 2


class Layer(torch.nn.Module):
    """Experts that are chosen, and weighted, by functions of the logits."""

    def __init__(self, route, dtype=torch.float32, bias=False):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.route = route
        self.bias = torch.nn.Parameter(torch.randn(E, generator=g).to(dtype)) if bias else None
        shapes = {"router": (E, H), "up": (E, 2 * N, H), "down": (E, H, N)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype)))

    def forward(self, x):
        w, e = self.route(F.linear(x, self.router, self.bias))
        a, b = torch.bmm(self.up[e.reshape(-1)], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        h = torch.bmm(self.down[e.reshape(-1)], (F.silu(a) * b).unsqueeze(-1)).view(-1, K, H)
        return (h * w.to(x.dtype).unsqueeze(-1)).sum(1), e


def by(score):
    """Experts chosen by a score, weights renormalised."""

    def route(z):
        w, e = torch.topk(score(z), K, dim=-1)
        return w / (w.sum(-1, keepdim=True) + 1e-3), e

    return route


def gathered(score, chosen_by):
    def route(z):
        e = torch.topk(chosen_by(z), K, dim=-1).indices
        return score(z).gather(1, e), e

    return route


def after(step):
    def route(z):
        w, e = torch.topk(z, K, dim=-1)
        return step(w), e

    return route


def grouped(z):
    s = z.tanh() + 1
    best = s.view(-1, 5, 1).amax(-1).topk(3, dim=-1)[1]
    mask = torch.zeros_like(s).scatter(1, best, 1.0)
    e = s.masked_fill(~mask.bool(), -9.0).topk(K, dim=-1)[1]
    return s.gather(1, e), e


# The route, and the score that is read: (score, softmax_of, choose_by).
SCORES = {
    "softplus, sqrt": (by(lambda z: F.softplus(z).sqrt()), ("sqrt(softplus(logits))", "logits", "score")),
    "tanh": (by(torch.tanh), ("tanh(logits)", "logits", "score")),
    "twice": (by(lambda z: z.sigmoid() * 2), ("mul(sigmoid(logits), 2.0)", "logits", "score")),
    "relu squared": (by(lambda z: F.relu(z) ** 2), ("mul(relu(logits), relu(logits))", "logits", "score")),
    "clamped": (
        by(lambda z: z.clamp(-0.5, 0.5)),
        ("clamp_max(clamp_min(logits, -0.5), 0.5)", "logits", "score"),
    ),
    "one less": (by(lambda z: 1 - torch.exp(-F.softplus(z))), None),
    "two readings": (by(lambda z: z * z.sigmoid()), ("mul(logits, sigmoid(logits))", "logits", "score")),
    "softmax": (by(lambda z: z.softmax(-1)), ("softmax", "logits", "score")),
    "tempered": (by(lambda z: F.softmax(z / 0.5, -1)), ("softmax", "div(logits, 0.5)", "score")),
    "capped": (
        by(lambda z: F.softmax(torch.tanh(z / 3) * 3, -1)),
        ("softmax", "mul(tanh(div(logits, 3.0)), 3.0)", "score"),
    ),
    "root of softmax": (by(lambda z: F.softmax(z, -1).sqrt()), ("sqrt(softmax)", "logits", "score")),
    "softmax of the chosen by logits": (
        gathered(lambda z: z.softmax(-1), lambda z: z),
        ("softmax", "logits", "logits"),
    ),
    "tanh of the chosen by logits": (gathered(torch.tanh, lambda z: z), ("tanh(logits)", "logits", "logits")),
    "after the choice": (after(lambda w: w.sigmoid() + 0.5), ("add(sigmoid(logits), 0.5)", "logits", "logits")),
    "groups": (grouped, ("add(tanh(logits), 1.0)", "logits", "score")),
}
# What crosses rows or experts in another way, or reads something else than the logits.
NEAR = {
    "less the mean": by(lambda z: z.sigmoid() - z.sigmoid().mean(-1, keepdim=True)),
    "over tokens": by(lambda z: z.exp() / z.exp().sum(0)),
    "softmax over tokens": by(lambda z: F.softmax(z.tanh(), 0)),
    "two softmaxes": by(lambda z: F.softmax(F.softmax(z, -1), -1)),
    "softmax and logits": by(lambda z: F.softmax(z, -1) * z.sigmoid()),
    "cumulated": by(lambda z: z.sigmoid().cumsum(-1)),
    "a number an expert": by(lambda z: z * torch.arange(1.0, E + 1)),
    "turned": by(lambda z: z.flip(-1).sigmoid()),
    "whole numbers": by(lambda z: z.round().tanh().long().float()),
    "cubed": by(lambda z: z**3),
    "chosen by another": gathered(torch.sigmoid, lambda z: z.abs()),
    "after another choice": lambda z: ((v := z.abs().topk(K))[0].tanh(), v[1]),
}


def compiled(module, grad=False, **options):
    torch._dynamo.reset()
    report = Report()
    options = {"rest": "eager", "kernels": "eager", "verify": True, **options}
    run = torch.compile(module, backend=Backend(Options.make(options), report=report), dynamic=False)
    return run, report


def inputs(dtype=torch.float32):
    """Rows that tie: several are equal, one is zero."""
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[3], x[4:6] = 0, x[0]
    return x


def spec_of(report):
    (site,) = report.sites
    return site, KernelSpec.parse(site.spec).router


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_read_and_right(name):
    route, expected = SCORES[name]
    module = Layer(route)
    run, report = compiled(module)
    x = inputs()
    with torch.no_grad():
        (y, e), (want, chosen) = run(x), module(x)
    site, router = spec_of(report)
    assert "in the graph" not in site.router, report
    assert expected is None or (router.score, router.softmax_of, router.choose_by) == expected
    assert torch.equal(e, chosen)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_compute_what_eager_computes(name):
    module = Layer(NEAR[name])
    run, report = compiled(module)
    x = inputs()
    with torch.no_grad():
        (y, e), (want, chosen) = run(x), module(x)
    assert "in the graph" in report.sites[0].router, report
    assert torch.equal(e, chosen)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def scattered(z):
    w, e = torch.topk(z, K, dim=-1)
    return torch.full_like(z, float("-inf")).scatter_(1, e, w).sigmoid().gather(1, e), e


BIASED = {
    "top-k's own": by(torch.sigmoid),
    "after the choice": after(torch.sigmoid),
    "gathered logits": gathered(lambda z: z, lambda z: z),
    "gathered scores": gathered(torch.sigmoid, lambda z: z),
    "scattered": scattered,
}


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_of_the_logits_is_in_the_weights_too(name):
    module = Layer(BIASED[name], bias=True)
    run, report = compiled(module)
    x = inputs()
    with torch.no_grad():
        (y, e), (want, chosen) = run(x), module(x)
    (site,) = report.sites
    assert site.status == "fused"
    assert "selection bias" not in site.router, report
    assert torch.equal(e, chosen)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


ROUNDED = {
    "in bf16": (lambda z: z.sigmoid() * 0.3, "mul(round_bf16(sigmoid(logits)), 0.3)", "bf16"),
    "bf16, then f32": (lambda z: z.sigmoid().float() * 0.3, "mul(round_bf16(sigmoid(logits)), 0.3)", "f32"),
    "in f32": (lambda z: z.float().sigmoid() * 0.3, "mul(sigmoid(logits), 0.3)", "f32"),
    "f32, then bf16": (lambda z: z.float().sigmoid().bfloat16() * 0.3, None, "bf16"),
    "softmax in f32": (lambda z: F.softmax(z, -1, dtype=torch.float32) ** 2, "mul(softmax, softmax)", "f32"),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_steps_in_half_precision_are_rounded_where_the_model_rounds_them(name):
    """The same scores tie: in bf16 many of 2,000 rows of small logits do."""
    score, expected, dtype = ROUNDED[name]
    module = Layer(by(score), torch.bfloat16)
    run, report = compiled(module)
    x = (torch.randn(2000, H, generator=torch.Generator().manual_seed(3)) / 8).bfloat16()
    with torch.no_grad():
        (_, e), (_, chosen) = run(x), module(x)
    site, router = spec_of(report)
    assert "in the graph" not in site.router, report
    assert expected is None or router.score == expected
    assert router.score_dtype == dtype
    assert torch.equal(e, chosen)


def test_a_training_step_has_eagers_gradients():
    module = Layer(SCORES["relu squared"][0])
    run, report = compiled(module)
    grads = []
    for call in (module, run):
        module.zero_grad()
        x = inputs().requires_grad_()
        call(x)[0].square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in module.parameters())])
    assert report.sites[0].status == "fused"
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["relu squared", "capped"])
def test_cpp_kernels_choose_as_eager(name):
    module = Layer(SCORES[name][0])
    run, report = compiled(module, kernels="cpp")
    with torch.no_grad():
        for x in (inputs(), inputs()[:1], inputs()[:0], inputs().repeat(1, 2)[:, ::2]):
            (y, e), (want, chosen) = run(x), module(x)
            assert torch.equal(e, chosen)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert "in the graph" not in report.sites[0].router, report
