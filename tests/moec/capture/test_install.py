"""Rolling is invisible outside moec: eager, other backends, signatures and lines stay; it comes off without trace."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path

import torch
from torch import nn

from moec.capture import install
from moec.capture.rewrite import promising


def routed(decorated):
    """A decorator that keeps the function in its closure only."""

    @functools.wraps(decorated)
    def forward(self, *args, **kwargs):
        return decorated(self, *args, **kwargs)

    del forward.__wrapped__
    return forward


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, *, scale: float = 1.0):
        idx, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for e in range(3):
            t = torch.where(idx == e)[0]
            y.index_add_(0, t, scale * self.experts[e](x[t]))
        return y


class Decorated(Plain):
    @routed
    def forward(self, x):
        idx, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            t = torch.where(idx == i)[0]
            y[t] += expert(x[t])
        return y


def run_experts(experts, idx, x):
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        t = torch.where(idx == i)[0]
        y[t] += expert(x[t])
    return y


class CallsAFunction(Plain):
    def forward(self, x):
        return run_experts(self.experts, self.gate(x).argmax(-1), x)


def graphs_of(model, x, name):
    torch._dynamo.reset()
    found: list[str] = []

    def backend(gm, example_inputs):
        found.append(gm.print_readable(print_output=False))
        return gm.forward

    inner = torch._dynamo.backends.registry.lookup_backend(name)
    out = torch.compile(model, backend=lambda gm, ex: (backend(gm, ex), inner(gm, ex))[1])(x)
    return found, out


def test_other_backends_see_no_difference():
    x = torch.randn(6, 8)
    cases = [(model, name) for model in (Plain(), Decorated()) for name in ("eager", "aot_eager")]
    install.install()
    with_moec = [graphs_of(model, x, name) for model, name in cases]
    install.uninstall()
    without = [graphs_of(model, x, name) for model, name in cases]
    for (on, out_on), (off, out_off) in zip(with_moec, without, strict=True):
        assert [_without_lines(g) for g in on] == [_without_lines(g) for g in off]
        assert torch.equal(out_on, out_off)


def _without_lines(graph):
    return [line for line in graph.splitlines() if not line.strip().startswith("#")]


def test_eager_is_bit_identical_and_uninstall_restores():
    x, model = torch.randn(6, 8), Plain()
    rolled = Plain.forward.__code__
    on = model(x)
    install.uninstall()
    assert Plain.forward.__code__ is not rolled
    assert torch.equal(on, model(x))


def test_code_keeps_its_face():
    rolled, signature = Plain.forward.__code__, inspect.signature(Plain.forward)
    lines = inspect.getsource(Plain.forward)
    install.uninstall()
    plain = Plain.forward.__code__
    assert rolled is not plain
    for field in (
        "co_filename",
        "co_firstlineno",
        "co_name",
        "co_argcount",
        "co_kwonlyargcount",
        "co_freevars",
        "co_flags",
    ):
        assert getattr(rolled, field) == getattr(plain, field)
    assert inspect.signature(Plain.forward) == signature
    assert inspect.getsource(Plain.forward) == lines


def test_traceback_names_the_users_line():
    model = Plain()
    try:
        model(torch.randn(6, 7))
    except RuntimeError as error:
        last = [f for f in inspect.getinnerframes(error.__traceback__) if f.filename == __file__][-1]
        assert "self.gate(x)" in last.code_context[0]


def test_decorated_function_in_a_closure(recorder):
    model, x = Decorated(), torch.randn(6, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 1


def test_function_of_the_same_file(recorder):
    model, x = CallsAFunction(), torch.randn(6, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 1


def test_class_made_after_install(recorder):
    class Later(Plain):
        def forward(self, x):
            idx, y = self.gate(x).argmax(-1), torch.zeros_like(x)
            for e in range(3):
                t = torch.where(idx == e)[0]
                y.index_add_(0, t, self.experts[e](x[t]))
            return y

    model, x = Later(), torch.randn(6, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 1


def test_backend_is_known_through_wrappers(make_recorder):
    for wrap in (lambda b: b, lambda b: functools.partial(b)):
        recorder = make_recorder()
        model, x = Plain(), torch.randn(6, 8)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend=wrap(recorder))(x), model(x))
        assert recorder.anchors == 1


def test_global_settings_untouched(recorder):
    before = torch._dynamo.config.capture_dynamic_output_shape_ops, torch._dynamo.config.capture_scalar_outputs
    torch.compile(Plain(), backend=recorder)(torch.randn(6, 8))
    assert before == (
        torch._dynamo.config.capture_dynamic_output_shape_ops,
        torch._dynamo.config.capture_scalar_outputs,
    )


def test_no_function_of_torch_is_read(monkeypatch):
    """Not even of the classes that a model's own are made of, whose names lead to all of torch."""
    install.uninstall()
    read = []
    monkeypatch.setattr(install, "promising", lambda code: read.append(code.co_filename) or promising(code))
    install.install()
    home = str(Path(torch.__file__).parent)
    assert Plain in install._installation().kept
    assert nn.Sequential in install._installation().kept
    assert __file__ in read
    assert not [name for name in read if name.startswith(home)]


def test_a_function_that_torch_wraps_is_read(recorder):
    class NoGrad(Plain):
        @torch.no_grad()
        def forward(self, x):
            idx, y = self.gate(x).argmax(-1), torch.zeros_like(x)
            for e in range(3):
                t = torch.where(idx == e)[0]
                y.index_add_(0, t, self.experts[e](x[t]))
            return y

    model, x = NoGrad(), torch.randn(6, 8)
    assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 1
