"""The raise in its own words: exact text for the spellings that matching relies on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from moec.passes.raising.vocabulary import raise_fx

X, Y, W = torch.randn(6, 4), torch.randn(6, 4), torch.randn(5, 4)
C, D = torch.randn(3, 6, 4), torch.randn(3, 4, 5)


def test_update_in_place_is_a_new_value(meaning):
    def fn(x):
        x = x.exp()
        x /= x.sum(-1, keepdim=True)
        return x

    assert meaning.raised_text(fn, X) == (
        "graph(%l_x_: f32[6, 4]) {\n"
        "  %x = exp(%l_x_) : f32[6, 4]\n"
        "  %sum_1 = reduce_sum(%x) dims=[1] keepdim=True : f32[6, 1]\n"
        "  %x_1 = div(%x, %sum_1) : f32[6, 4]\n"
        "  return %x_1\n}\n"
    )


def test_updated_input_is_an_output_and_its_views_change(meaning):
    def fn(x):
        v = x.view(-1)
        x.add_(1)
        return v * 2

    text = meaning.raised_text(fn, X)
    assert "%v.1" not in text
    assert "= changed_view(%v, %add_, %l_x_) : f32[24]" in text
    assert text.endswith("return %mul, %add_\n}\n")


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.view(6, 4),
        lambda x: x.clone(),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float32),
        lambda x: x.float(),
        lambda x: x.detach(),
        lambda x: x.expand(6, 4),
        lambda x: x[:],
        lambda x: x.reshape(-1, 4),
    ],
)
def test_views_casts_and_copies_that_change_nothing_are_gone(meaning, fn):
    assert meaning.words(lambda x: fn(x).exp(), X) == ["exp"]


@pytest.mark.parametrize(
    ("fn", "args", "eq"),
    [
        (lambda x, w: F.linear(x, w), (X, W), "ab,cb->ac"),
        (lambda x, w: torch.mm(x, w), (X, W.t().contiguous()), "ab,bc->ac"),
        (lambda x, w: x @ w, (X, W.t().contiguous()), "ab,bc->ac"),
        (lambda x, w: torch.einsum("td,ed->te", x, w), (X, W), "ab,cb->ac"),
        (lambda c, d: torch.bmm(c, d), (C, D), "abc,acd->abd"),
        (lambda c, d: torch.matmul(c, d), (C, D), "abc,acd->abd"),
        (lambda c, d: torch.baddbmm(torch.zeros(5), c, d), (C, D), "abc,acd->abd"),
        (lambda c, w: F.linear(c, w), (C, W), "abc,dc->abd"),
    ],
)
def test_every_product_is_a_contraction(meaning, fn, args, eq):
    assert f'eq="{eq}"' in meaning.raised_text(fn, *args)


@pytest.mark.parametrize(
    ("fill", "args", "kwargs"),
    [
        (torch.full, ((6, 4), 2.0), {"device": 0}),
        (torch.full, ((6, 4),), {"fill_value": 2.0, "device": 0}),
        (torch.full_like, (X, 2.0), {"device": 0}),
        ("new_full", (X, (6, 4), 2.0), {"device": 0}),
    ],
)
def test_a_devices_number_is_no_fill(fill, args, kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = X
    args = tuple(x if arg is X else arg for arg in args)
    node = graph.call_method(fill, args, kwargs) if isinstance(fill, str) else graph.call_function(fill, args, kwargs)
    node.meta["example_value"] = X
    graph.output(node)
    (made,) = raise_fx(fx.GraphModule(torch.nn.Module(), graph)).graph.instrs
    assert (made.word, made.attr("value")) == ("full", 2.0)


def test_slices_of_chunks(meaning):
    text = meaning.raised_text(lambda x: x.chunk(2, dim=-1)[1].exp(), X)
    assert "slice(%l_x_) dim=1 start=2 stop=4 step=1 : f32[6, 2]" in text


def test_tensors_that_change_their_shape_in_place_make_all_opaque(meaning):
    def fn(x):
        x = (x * 1).unsqueeze(0)
        x.squeeze_(0)
        return x + 1

    assert set(meaning.words(fn, X)) == {"opaque"}


def test_attributes_of_complex_tensors_are_not_sizes(meaning):
    assert "size" not in meaning.words(lambda z: z.real + z.imag, torch.randn(3, dtype=torch.complex64))


@torch._dynamo.allow_in_graph
def silu(x):
    return x * 2


@pytest.mark.parametrize("module", ["model", "torchlike.functional"])
def test_a_users_function_with_a_known_name_is_opaque(meaning, monkeypatch, module):
    monkeypatch.setattr(silu, "__module__", module)
    assert meaning.words(lambda x: silu(x), X) == ["opaque"]
