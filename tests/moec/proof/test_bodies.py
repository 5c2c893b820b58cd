"""The proof of experts with code of their own: sorting their rows changes nothing, and where it did, it is not done."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moec.backend import explain
from moec.passes.opaque import lower as opaque_lower
from moec.proof import compare, copying

T, H, E, K = 13, 8, 4, 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))


class Mixed(nn.Module):
    """An expert whose rows see one another, so that their order matters."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(H, H), nn.LayerNorm(H)

    def forward(self, x):
        return self.norm(self.up(x)) + x.cumsum(0)


class Layer(nn.Module):
    """A loop over such experts; `route` gives weights and experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Mixed() for _ in range(E))
        self.register_buffer("served", torch.zeros(E))

    def route(self, x):
        return F.softmax(self.gate(x), -1).topk(K, -1)

    def forward(self, x):
        w, e = self.route(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(e == i)
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class OverShared(Layer):
    """Results are added to what another layer gave; rows by hit experts, slots first."""

    def forward(self, x):
        w, e = self.route(x)
        y = torch.tanh(self.gate(x)).repeat(1, H // E)
        hot = F.one_hot(e, E).permute(2, 1, 0)
        for i in torch.greater(hot.sum((-1, -2)), 0).nonzero():
            i = i[0]
            slot, token = torch.where(hot[i])
            y.index_add_(0, token, self.experts[i](x[token]) * w[token, slot, None])
        return y


class AddedToACopy(Layer):
    """One expert a token, whose rows are added to those of a copy of x."""

    def forward(self, x):
        w, e = F.softmax(self.gate(x), -1).max(-1)
        y = x.clone()
        for i, expert in enumerate(self.experts):
            mine = e == i
            if mine.any():
                y[mine] = x[mine] + w[mine, None] * expert(x[mine])
        return y


class Dropping(Layer):
    """Weak choices go to no expert."""

    nobody = -1

    def route(self, x):
        w, e = super().route(x)
        return w, e.masked_fill(w < 0.3, self.nobody)


class DroppingBeyond(Dropping):
    nobody = E


class Counting(Layer):
    """Each iteration also counts its rows, in a buffer."""

    def forward(self, x):
        w, e = self.route(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(e == i)
            self.served[i] += (e == i).sum()
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


def made(kind):
    torch.manual_seed(0)
    return kind(), torch.randn(T, H)


def explained(model, x, grad=False, **options):
    with torch.set_grad_enabled(grad):
        (site,) = explain(model, x, moec_options={"rest": "eager", "kernels": "eager", **options}).sites
    return site


def agrees(kind, **options):
    """Whether the compiled layer gives eager's output, and leaves eager's buffers."""
    (eager, x), (compiled, _) = made(kind), made(kind)
    torch._dynamo.reset()
    run = torch.compile(compiled, backend="moec", options={"rest": "eager", "kernels": "eager", **options})
    with torch.no_grad():
        same = torch.allclose(run(x), eager(x), atol=1e-5)
    return same and torch.equal(compiled.served, eager.served)


@pytest.mark.parametrize(
    ("kind", "grad", "routings"),
    [
        (Layer, True, 3),
        (OverShared, True, 3),
        (AddedToACopy, True, 3),
        (Dropping, False, 5),
        (DroppingBeyond, True, 5),
        (Counting, False, 3),
    ],
)
def test_sorting_rows_is_proved(kind, grad, routings):
    site = explained(*made(kind), grad=grad)
    assert site.status == "fused"
    assert "own code" in site.experts
    assert site.proof.startswith("proved in "), site.proof
    assert f": {routings} routings" in site.proof, site.proof
    assert agrees(kind)


def test_the_verdict_is_remembered_on_disk(monkeypatch):
    assert explained(*made(Layer)).proof.startswith("proved in")
    monkeypatch.setattr(compare.Runner, "trial", pytest.fail)
    assert explained(*made(Layer)).proof.startswith("proved before: 3 routings")


def backwards(choice, experts, k, slots_first):
    """Rows of one expert in another order than the loop has."""
    token, place, start, end = dispatch(choice, experts, k, slots_first)
    return token.flip(0), place.flip(0), token.shape[0] - end, token.shape[0] - start


def nobody_first(choice, experts, k, slots_first):
    """Choices of no expert are sorted before the others, and taken for them."""
    ordered, place = torch.sort(choice.reshape(-1), stable=True)
    ids = torch.arange(experts)
    return place // k, place, torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)


def forgets(base, token, rows, axes):
    return rows.new_zeros(base.shape).index_add(0, token[: rows.shape[0]], rows)


dispatch = opaque_lower.dispatch
SABOTAGE = {
    "rows in another order": (Layer, "dispatch", backwards),
    "choices of no expert are taken for one": (Dropping, "dispatch", nobody_first),
    "what was there before is lost": (OverShared, "combine", forgets),
    "what the loop counts is lost": (Counting, "_effects", lambda raised, inside: frozenset()),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_wrong_sort_is_not_used(name, monkeypatch):
    kind, what, wrong = SABOTAGE[name]
    monkeypatch.setattr(opaque_lower, what, wrong)
    assert not agrees(kind, proof="off"), "the sabotage does nothing"
    with pytest.warns(RuntimeWarning, match="computes something else"):
        assert agrees(kind)
    with pytest.warns(RuntimeWarning, match="differs by"):
        assert explained(*made(kind)).status == "declined"


def test_what_cannot_be_tried_is_said_and_strict_does_without(monkeypatch):
    monkeypatch.setattr(copying, "LIMIT", 2)
    site = explained(*made(Layer))
    assert (site.status, site.proof) == ("fused", "unproved: the matched code reads more than 2 nodes of the graph")
    assert explained(*made(Layer), proof="strict").status == "declined"
    assert explained(*made(Layer), proof="off").proof == "off"
