"""Every form of a loop over experts: one graph, and the same outputs and gradients as eager."""

from __future__ import annotations

import pytest
import torch
from loop_forms import (
    FORMS,
    BooleanMask,
    BoundAnew,
    HitRows,
    InMethodWithSuper,
    RangeWhere,
    StackedColumns,
    UniqueTolist,
    Widened,
)
from torch import nn

from moec.capture import install


def gradients(model, out, x):
    model.zero_grad()
    if not out.requires_grad:
        return [None]
    out.sin().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def compare(model, compiled, x, tolerance=0.0):
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, got = model(a), compiled(b)
    assert torch.allclose(got, expected, rtol=tolerance, atol=tolerance)
    for p, q in zip(gradients(model, expected, a), gradients(model, got, b), strict=True):
        assert (p is None) == (q is None)
        assert p is None or torch.allclose(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_one_graph_and_equal_to_eager(form, recorder):
    model = form()
    compiled = torch.compile(model, backend=recorder, dynamic=True)
    for tokens in (7, 2, 64):
        compare(model, compiled, torch.randn(tokens, 8))
    assert len(recorder.graphs) == 1
    assert recorder.anchors == (2 if form is InMethodWithSuper else 1)
    assert recorder.declined == ()


@pytest.mark.parametrize(("form", "why"), [(Widened, "where it began as"), (BoundAnew, "bound anew")])
def test_a_sum_that_becomes_another_tensor_is_traced_as_written(form, why, recorder):
    model = form()
    with torch.no_grad():
        x = torch.randn(7, 8)
        assert torch.equal(torch.compile(model, backend=recorder)(x), model(x))
    assert recorder.anchors == 0
    assert any(why in str(one) for one in (*recorder.declined, *install.declined()))


@pytest.mark.parametrize(
    "form", [RangeWhere, HitRows, BooleanMask, UniqueTolist, StackedColumns], ids=lambda f: f.__name__
)
def test_small_and_skewed_batches(form, recorder):
    model = form()
    compiled = torch.compile(model, backend=recorder)
    for tokens in (0, 1):
        compare(model, compiled, torch.randn(tokens, 8))
    with torch.no_grad():  # every token chooses experts 0 and 1, the others are idle
        model.gate.weight.zero_()
        model.gate.weight[0], model.gate.weight[1] = 5.0, 4.0
    compare(model, compiled, torch.rand(7, 8))


@pytest.mark.parametrize("form", [RangeWhere, BooleanMask], ids=lambda form: form.__name__)
@pytest.mark.parametrize("k", [1, 4])
def test_one_and_all_experts_a_token_in_bf16(form, k, recorder):
    model = form(k=k).to(torch.bfloat16)
    compare(model, torch.compile(model, backend=recorder), torch.randn(13, 8, dtype=torch.bfloat16))
    assert len(recorder.graphs) == 1


def test_at_most_two_compiles_over_token_counts(recorder):
    model = RangeWhere()
    compiled = torch.compile(model, backend=recorder)
    for tokens in (1, 2, 7, 64, 513, 4096):
        with torch.no_grad():
            x = torch.randn(tokens, 8)
            assert torch.equal(compiled(x), model(x))
    assert len(recorder.graphs) <= 2


def test_tied_experts_and_state_dict_untouched(recorder):
    model = RangeWhere()
    model.experts[3] = model.experts[0]
    names = list(model.state_dict())
    compare(model, torch.compile(model, backend=recorder), torch.randn(9, 8))
    assert len(recorder.graphs) == 1
    assert list(model.state_dict()) == names


def test_weights_replaced_after_compiling(recorder):
    model = RangeWhere()
    compiled = torch.compile(model, backend=recorder)
    x = torch.randn(5, 8)
    compiled(x)
    with torch.no_grad():
        model.experts[2].w1.weight.mul_(3)
        model.experts[1].w2.weight = nn.Parameter(torch.randn(8, 12))
    compare(model, compiled, x)
