"""Pointwise expressions: text and back, values and derivatives against torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import ParseError
from moec.ir.expr import POINTWISE, Call, Const, Var, call, derivative, evaluate, parse, variables

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
POSITIVE = {"log", "sqrt", "log1p"}
SWIGLU_LIMITED = (
    "mul(mul(clamp_max(a, 7.0), sigmoid(mul(1.702, clamp_max(a, 7.0)))), add(clamp_min(clamp_max(b, 7.0), -7.0), 1.0))"
)

LEAVES = st.sampled_from([Var("a"), Var("b"), Var("_x1")]) | st.floats(allow_nan=False).map(Const)


def calls(children):
    return st.sampled_from(sorted(POINTWISE)).flatmap(
        lambda fn: st.tuples(*[children] * POINTWISE[fn].arity).map(lambda args: Call(fn, args))
    )


@QUICK
@given(st.recursive(LEAVES, calls, max_leaves=8))
def test_text_reads_back(expr):
    assert parse(str(expr)) == expr
    assert variables(expr) <= {"a", "b", "_x1"}


def test_spelling():
    expr = parse(" mul( silu(a),b ) ")
    assert expr == Call("mul", (Call("silu", (Var("a"),)), Var("b")))
    assert str(expr) == "mul(silu(a), b)"
    assert parse("add(a, -0.5)") == Call("add", (Var("a"), Const(-0.5)))
    assert parse("2") == Const(2.0)
    assert parse("-inf") == Const(-math.inf)
    assert math.isnan(parse("nan").value)
    assert variables(expr) == {"a", "b"}
    assert variables(Const(1.0)) == frozenset()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a name, a number or a bracket at column 0"),
        ("mul(a", "expected a name, a number or a bracket at column 5"),
        ("mul(a b)", r"expected ',' or '\)' at column"),
        ("mul(a, )", r"expected a name or a number at column \d, got '\)'"),
        ("mul(a)", "'mul' takes 2 arguments, got 1"),
        ("sin(a)", "unknown pointwise function 'sin'; known: add, sub"),
        ("silu(a) b", "expected its end at column 7, got ' b'"),
        ("add(a, 1.2.3)", "expected a number at column 7, got '1.2.3'"),
        ("a $ b", "expected its end"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ParseError, match=message):
        parse(text)


def test_call_checks_its_arity():
    assert call("neg", Var("a")) == Call("neg", (Var("a"),))
    with pytest.raises(ParseError, match="'neg' takes 1 arguments, got 2"):
        call("neg", Var("a"), Var("b"))


def operands(fn, count=257):
    """fp64 operands in the function's domain, spread over both tails and away from kinks."""
    generator = torch.Generator().manual_seed(len(fn))
    made = []
    for i in range(POINTWISE[fn].arity):
        x = torch.randn(count, dtype=torch.float64, generator=generator) * 4
        x = x.abs() + 0.1 if fn in POSITIVE else x
        made.append(torch.where(x.abs() < 0.05, x + 0.5, x) + i * 1e-3)
    return made


def gradients(fn, args, count):
    leaves = [x.detach().clone().requires_grad_() for x in args]
    value = POINTWISE[fn].eager(*leaves)
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in leaves[:count]]
    found = torch.autograd.grad(value.sum(), leaves[:count], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=False)]


def derivatives(fn, args):
    names = ["a", "b"][: len(args)]
    expr = call(fn, *map(Var, names))
    env = dict(zip(names, args, strict=True))
    return [evaluate(derivative(expr, name), env).expand(args[0].shape) for name in names]


@pytest.mark.parametrize("fn", sorted(POINTWISE))
def test_derivative_is_autograds(fn):
    args = operands(fn)
    for got, want in zip(derivatives(fn, args), gradients(fn, args, len(args)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


KINKS = ["relu", "abs", "clamp_min", "clamp_max", "maximum", "minimum", "ge", "gt", "gelu", "silu", "softplus"]


@pytest.mark.parametrize("fn", KINKS)
def test_derivative_at_kinks_is_torchs_choice(fn):
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, 3.0, 7.0, -7.0], dtype=torch.float64)
    args = [x, torch.tensor([-1.0, 0.0, 0.0, 1.0, 2.0, 7.5, -7.0], dtype=torch.float64)][: POINTWISE[fn].arity]
    for got, want in zip(derivatives(fn, args), gradients(fn, args, len(args)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("fn", ["silu", "sigmoid", "tanh", "gelu", "gelu_tanh", "erf", "softplus", "relu"])
def test_derivative_is_finite_far_out(fn):
    x = torch.tensor([-1e4, -100.0, -30.0, 30.0, 100.0, 1e4], dtype=torch.float64)
    (got,), (want,) = derivatives(fn, [x]), gradients(fn, [x], 1)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("mul(silu(a), b)", lambda a, b: torch.nn.functional.silu(a) * b),
        ("mul(gelu_tanh(a), b)", lambda a, b: torch.nn.functional.gelu(a, approximate="tanh") * b),
        ("mul(relu(a), relu(a))", lambda a, b: torch.relu(a).square() + 0 * b),
        (
            SWIGLU_LIMITED,
            lambda a, b: a.clamp(max=7) * torch.sigmoid(1.702 * a.clamp(max=7)) * (b.clamp(-7, 7) + 1),
        ),
        ("maximum(a, mul(0.1, a))", lambda a, b: torch.nn.functional.leaky_relu(a, 0.1) + 0 * b),
        ("div(a, add(1.0, abs(b)))", lambda a, b: a / (1 + b.abs())),
    ],
)
def test_activations_and_their_gradients(text, reference):
    expr = parse(text)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(13, 7, dtype=torch.float64, generator=generator).mul(5).requires_grad_() for _ in range(2))
    want = reference(a, b)
    torch.testing.assert_close(evaluate(expr, {"a": a, "b": b}), want)
    for name, grad in zip("ab", torch.autograd.grad(want.sum(), (a, b)), strict=True):
        got = evaluate(derivative(expr, name), {"a": a.detach(), "b": b.detach()})
        torch.testing.assert_close(got.expand(grad.shape), grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (13, 7)])
def test_evaluate_keeps_dtype_and_shape(dtype, shape):
    a = torch.randn(shape).to(dtype)
    b = torch.randn(shape[1], shape[0]).to(dtype).t()
    for text in ("mul(silu(a), b)", "add(gt(a, b), ge(a, 0.5))"):
        got = evaluate(parse(text), {"a": a, "b": b})
        assert got.dtype == dtype
        assert got.shape == a.shape
    torch.testing.assert_close(evaluate(parse("mul(silu(a), b)"), {"a": a, "b": b}), torch.nn.functional.silu(a) * b)


def test_derivatives_drop_what_is_zero_or_one():
    assert derivative(parse("mul(silu(a), b)"), "b") == parse("silu(a)")
    assert derivative(parse("add(a, 1.0)"), "a") == Const(1.0)
    assert derivative(parse("mul(silu(b), 3.0)"), "a") == Const(0.0)
    assert str(derivative(parse("clamp_min(a, 0.5)"), "a")) == "ge(a, 0.5)"
