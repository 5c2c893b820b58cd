"""Capacity: bounds that are proved, drops that are removed, and near misses that compute what eager computes."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
import torch.nn.functional as F
from spelling import E, Routed, tokens
from spellings_capacity import Top2

from moec.backend import Backend
from moec.ir.formulas import at_least, size_of
from moec.options import Options
from moec.report import Report

T = sympy.Symbol("s0", integer=True)


@pytest.mark.parametrize(
    ("capacity", "queue", "proved"),
    [
        ("s0", T, True),
        ("Max(4, CeilToInt(FloatTrueDiv(8.0*ToFloat(s0), 4.0)))", 2 * T, True),
        ("TruncToInt(FloatTrueDiv(4.0*ToFloat(s0), 4.0))", T, True),
        ("Max(4, CeilToInt(FloatTrueDiv(2.0*ToFloat(s0), 4.0)))", T, False),
        ("s0 - 1", T, False),
        ("4*((s0 + 3)//4)", T, True),  # padded to a multiple, in the ways that people write it
        ("-4*((-s0)//4)", T, True),
        ("s0 + Mod(-s0, 8)", T, True),
        ("s0 - Mod(s0, 4) + 3", T, True),
        ("Max(4, -4*FloorDiv(-TruncToInt(FloatTrueDiv(8.0*ToFloat(s0), 4.0)), 4))", 2 * T, True),
        ("Max(4, s0) + Mod(Max(4, s0), 2)", T, True),
        ("8*CeilDiv(CeilToInt(FloatTrueDiv(4.0*ToFloat(s0), 4.0)), 8)", T, True),
        ("RoundToInt(FloatTrueDiv(4.0*ToFloat(s0), 4.0))", T, True),
        ("RoundToInt(FloatTrueDiv(3.9*ToFloat(s0), 4.0))", T, False),
        ("4*(s0//4)", T, False),
        ("8*((s0 + 6)//8)", T, False),
        ("s0 - Mod(s0, 4) + 2", T, False),
        ("CeilToInt(0.9999*ToFloat(s0))", T, False),
        ("12", sympy.Integer(12), True),
        ("11", sympy.Integer(12), False),
    ],
)
def test_a_queue_is_proved_to_fit(capacity, queue, proved):
    assert at_least(size_of(capacity), queue) is proved


PIECES = ("s0", "2*s0", "FloorDiv(s0, 3)", "CeilDiv(s0, 4)", "Mod(s0, 5)", "7", "CeilToInt(1.3*ToFloat(s0))")


def test_what_is_proved_holds_for_every_number_tried():
    proved = 0
    for first, second, number in itertools.product(PIECES, PIECES, (-2, -1, 1, 3)):
        a, b = size_of(f"Max(2, {first}) + {number}*({second})"), size_of("s0 + 1")
        if at_least(a, b):
            proved += 1
            assert all(a.subs(T, n) >= n + 1 for n in range(40)), a
    assert proved >= 20


class Mutant(Routed):
    """One expert a token; how it counts and what it keeps is what the mutants change."""

    seats, bound, sent, last = 6, 6, 1.0, False

    def forward(self, x):
        gate, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        mask = F.one_hot(chosen, E)
        place = torch.cumsum(mask, 0) - 1
        if self.last:
            place = torch.cumsum(mask.flip(0), 0).flip(0) - 1
        kept = mask * (place < self.bound)
        seat = F.one_hot((place * kept).sum(-1), self.seats)
        table = torch.einsum("te,tc->tec", kept.float(), seat.float())
        if self.sent == 0.0:
            table = torch.einsum("te,tc->tec", mask.float(), seat.float())
        rows = torch.einsum("tec,th->ech", table, x)
        return torch.einsum("tec,ech->th", table * gate[:, None, None], self.experts(rows))


class FewerKept(Mutant):
    bound = 4


class LastFirst(Mutant):
    last = True


class SharedSeat(Mutant):
    """What is dropped is sent to seat 0."""

    sent = 0.0


def compiled(module, x):
    torch._dynamo.reset()
    report = Report()
    run = torch.compile(module, backend=Backend(Options.make({"rest": "eager", "kernels": "eager"}), report=report))
    return run(x), [s.status for s in report.sites], run


@pytest.mark.parametrize(
    ("kind", "status"),
    [(Mutant, "fused"), (FewerKept, "fused"), (LastFirst, "declined"), (SharedSeat, "declined")],
)
def test_mutants_compute_what_eager_computes(kind, status):
    torch.manual_seed(0)
    module, (x,) = kind(), tokens(40)
    with torch.no_grad():
        got, statuses, _ = compiled(module, x)
        torch.testing.assert_close(got, module(x), atol=1e-6, rtol=1e-5)
    assert statuses == [status]


class Kept(Backend):
    """Keeps the graph that is left."""

    def compile_rest(self, gm, example_inputs):
        KEPT.append(str(gm.graph))
        return gm.forward


KEPT: list[str] = []


@pytest.mark.parametrize(("factor", "drops"), [(float(E), False), (0.5, True)])
def test_drop_logic_is_left_only_where_a_queue_may_be_too_long(factor, drops):
    torch.manual_seed(0)
    module, (x,) = Top2(factor), tokens(40)
    torch._dynamo.reset()
    KEPT.clear()
    torch.compile(module, backend=Kept(Options.make({"rest": "eager", "kernels": "eager"})))(x)
    assert len(KEPT) == 1
    assert "moec.experts" in KEPT[0]
    assert ("cumsum" in KEPT[0]) is drops
    assert "sec->ecm" not in KEPT[0]  # nothing of size [T, E, C]
    assert "ecm->sm" not in KEPT[0]
