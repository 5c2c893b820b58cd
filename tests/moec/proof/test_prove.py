"""The proof: right rewrites pass it, wrong ones are not used, and it is cheap, remembered and without side effects."""

from __future__ import annotations

import gc
import operator
import sys
import warnings

import proof_layers
import pytest
import torch
import torch.nn.functional as F
from proof_layers import (
    Dense,
    DenseRest,
    DenseRotated,
    Gathered,
    H,
    K,
    Loop,
    OverTokens,
    Rotated,
    SkippingLoop,
    Smallest,
    SortedOnce,
    T,
)
from spellings_capacity import BATCHED, Counted, Groups, TopK
from torch import nn

import moec
from moec.passes.dispatch.row_rules import RULES
from moec.passes.experts import find_experts
from moec.passes.lowering import lower_words
from moec.passes.routers import find_routers, routing
from moec.passes.rows.lift import Lifter
from moec.passes.rows.rows import Ids, Rows, Space
from moec.proof import compare, copying, store
from moec.proof.compare import executable
from moec.proof.region import Half
from moec.proof.routings import Maker, Trial
from moec.proof.sizes import Sizes, _assign
from moec.runtime import ops as runtime  # noqa: F401  # registers the ops


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))


def made(kind, **kwargs):
    torch.manual_seed(0)
    return kind(**kwargs)


def explained(model, x, **options):
    with torch.no_grad():
        return moec.explain(model, x, moec_options={"rest": "eager", "kernels": "eager", **options})


def computed(model, x, **options):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="moec", options={"rest": "eager", "kernels": "eager", **options})(x)


@pytest.mark.parametrize("kind", [Loop, Gathered, Dense, Rotated])
@pytest.mark.parametrize("grad", [False, True])
def test_right_rewrites_are_proved(kind, grad):
    model, x = made(kind), torch.randn(T, H)
    with torch.set_grad_enabled(grad):
        report = moec.explain(model, x, moec_options={"rest": "eager", "kernels": "eager"})
    (site,) = report.sites
    assert site.status == "fused"
    assert site.proof.startswith("proved in "), site.proof
    routings = 4 if kind is Rotated else 3  # one expert twice, where nothing says that it cannot be
    assert f"{routings} routings" in site.proof
    assert report.proof_seconds > 0
    assert site.proof in str(report).replace("\n", " ")


def test_what_is_called_like_torch_is_not_in_a_remembered_text():
    def silu(x):
        return x

    silu.__module__ = "torchlike.functional"
    assert store._target_text(silu) is None
    assert store._target_text(F.silu) == "torch.nn.functional.silu"


def test_a_verdict_is_remembered_on_disk_and_forgotten_when_moec_changes(monkeypatch):
    model, x = made(Loop), torch.randn(T, H)
    assert explained(model, x).sites[0].proof.startswith("proved in")
    monkeypatch.setattr(compare.Runner, "trial", pytest.fail)
    assert explained(model, x).sites[0].proof.startswith("proved before: 3 routings")
    assert explained(made(Loop), x * 2).sites[0].proof.startswith("proved before")


def test_a_changed_matcher_forgets(tmp_path, monkeypatch):
    from moec.proof import store

    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    model, x = made(Loop), torch.randn(T, H)
    explained(model, x)
    monkeypatch.setattr(store, "source_hash", lambda: "another")
    assert explained(model, x).sites[0].proof.startswith("proved in")


def test_layers_of_one_structure_are_proved_once(monkeypatch):
    runs = []
    init = compare.Runner.__init__
    monkeypatch.setattr(compare.Runner, "__init__", lambda self, *a, **k: (runs.append(1), init(self, *a, **k))[1])
    torch.manual_seed(0)
    model = nn.Sequential(*(Loop() for _ in range(6)))
    report = explained(model, torch.randn(T, H))
    assert [s.status for s in report.sites] == ["fused"] * 6
    assert len({s.proof for s in report.sites}) == 1
    assert len(runs) == 1


def always(value):
    return lambda *args, **kwargs: value


def skip_for_any_reason(lifter: Lifter, instr, which):
    return lifter.lift(instr.args[0])


def any_order(lifter: Lifter, instr, which):
    found = RULES["index"](lifter, instr, which)
    if isinstance(found, Rows | Ids):
        return found
    inner = lifter.lift(instr.args[0])
    return Rows(Space("slots", K), inner.row, "flat", inner.choice) if isinstance(inner, Rows) else found


def patch_rules(monkeypatch, **rules):
    monkeypatch.setattr(find_experts, "RULES", {**RULES, **rules})


def patch_softmax_axis(monkeypatch):
    score = routing.read_score

    def lax(graph, value):
        made = graph.defs.get(value)
        if made is not None:  # an input was made by nothing
            object.__setattr__(made, "attrs", tuple((n, 1 if n == "dim" else v) for n, v in made.attrs))
        return score(graph, value)

    monkeypatch.setattr(routing, "read_score", lax)


def patch_largest(monkeypatch):
    """A router that takes the smallest scores is taken for one that takes the largest."""
    match = find_routers.match_router

    def lax(graph, weights, choice):
        instrs = []
        for i in graph.instrs:
            attrs = tuple((n, True if n == "largest" else v) for n, v in i.attrs)
            instrs.append(type(i)(i.results, i.word, i.args, i.types, attrs, i.loc))
        return match(graph.with_instrs(instrs), weights, choice)

    monkeypatch.setattr(find_routers, "match_router", lax)


SABOTAGE = {
    "an iteration may be skipped for any reason": (SkippingLoop, lambda m: patch_rules(m, skip=skip_for_any_reason)),
    "gates of unchosen experts are not looked at": (
        DenseRest,
        lambda m: m.setattr(find_experts, "_image", always(0.0)),
    ),
    "the smallest are the largest": (Smallest, patch_largest),
    "softmax is over any axis": (OverTokens, patch_softmax_axis),
    "rows may stay in expert order": (SortedOnce, lambda m: patch_rules(m, index=any_order)),
}


@pytest.mark.parametrize(("kind", "factor"), [(Counted, 0.5), (Groups, 1.0), (TopK, 0.4)])
def test_capacity_is_tried_with_full_queues(kind, factor):
    torch.manual_seed(0)
    report = explained(kind(factor), torch.randn(2, T, 16) if kind in BATCHED else torch.randn(T, 16))
    assert [site.proof[:9] for site in report.sites] == ["proved in"], report.sites
    assert ": 4 routings" in report.sites[0].proof


def test_a_seat_too_many_is_found(monkeypatch):
    torch.manual_seed(0)
    model, x = Counted(0.5), torch.randn(T, 16)
    below = lower_words.WORDS["below"]

    def up_to(graph, instr, args):
        node = below(graph, instr, args)
        node.target = torch.le  # the first pair that has no seat keeps one
        return node

    monkeypatch.setitem(lower_words.WORDS, "below", up_to)
    with pytest.warns(RuntimeWarning, match="computes something else"):
        report = explained(model, x)
    assert [site.status for site in report.sites] == ["declined"]


def test_crowded_choices_fill_two_queues_in_both_orders():
    make = Maker(torch.Generator().manual_seed(0), Trial("crowded", True), 4)
    chosen = make._choice((200, 2))
    assert chosen.unique().numel() == 2
    assert (chosen[:, 0] != chosen[:, 1]).all()
    assert all(0.3 < float((column == 2).double().mean()) < 0.7 for column in chosen.t())


@pytest.mark.parametrize("name", SABOTAGE)
def test_what_a_broken_matcher_lets_through_is_not_used(name, monkeypatch):
    kind, sabotage = SABOTAGE[name]
    model, x = made(kind), torch.randn(40, H)
    with torch.no_grad():
        want = model(x)
    sabotage(monkeypatch)
    assert not torch.allclose(computed(model, x, proof="off"), want, atol=1e-4), "the sabotage does nothing"
    with pytest.warns(RuntimeWarning, match="computes something else") as caught:
        report = explained(model, x)
    *inner, layer = report.sites  # a product within what was refused may be a layer of its own, and proved to be
    assert layer.status == "declined", report
    assert all(s.proof.startswith("proved") for s in inner if s.status == "fused"), report
    reason = next(str(w.message) for w in caught if "computes something else" in str(w.message))
    assert "differs by" in reason
    assert "routing '" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(computed(model, x), want, atol=1e-5, rtol=1e-5)


def test_an_expert_chosen_twice_is_tried_where_it_may_happen():
    model, x = made(DenseRotated), torch.randn(T, H)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = explained(model, x)
    (site,) = report.sites
    assert site.status == "declined"
    assert "routing 'repeated'" in site.reasons[0].predicate or caught
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(computed(model, x), model(x))


def test_what_cannot_be_tried_is_said_and_strict_does_without(monkeypatch):
    monkeypatch.setattr(copying, "LIMIT", 2)
    model, x = made(Loop), torch.randn(T, H)
    report = explained(model, x)
    assert report.sites[0].status == "fused"
    assert report.sites[0].proof == "unproved: the matched code reads more than 2 nodes of the graph"
    assert "unproved" in str(report)
    strict = explained(model, x, proof="strict")
    assert strict.sites[0].status == "declined"
    assert "proof is 'strict'" in strict.sites[0].reasons[0].predicate


def test_off_tries_nothing(monkeypatch):
    monkeypatch.setattr(compare.Runner, "trial", pytest.fail)
    report = explained(made(Loop), torch.randn(T, H), proof="off")
    assert (report.sites[0].status, report.sites[0].proof) == ("fused", "off")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [Loop, Dense])
def test_large_sizes_are_made_small(kind, dynamic, monkeypatch):
    seen = []
    values = compare.values
    monkeypatch.setattr(compare, "values", lambda *a: seen.append(values(*a)) or seen[-1])
    monkeypatch.setattr(proof_layers, "H", 384)
    model, x = made(kind, h=384, n=768), torch.randn(320, 384)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    report = explained(model, x)
    assert report.sites[0].proof.startswith("proved"), report.sites
    assert seen
    assert max(leaf.numel() for leaves in seen for leaf in leaves.values()) < 20_000
    assert {13, 7} <= {leaves["l_x_"].shape[0] for leaves in seen} or not dynamic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    model, x = made(Loop).to(dtype), torch.randn(T, H).to(dtype)
    assert explained(model, x).sites[0].proof.startswith("proved in")


def test_what_is_random_or_set_outside_stays_as_it_was():
    model, x = made(Loop), torch.randn(T, H)
    torch.set_num_threads(2)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    explained(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    with torch.inference_mode():
        report = moec.explain(model, x, moec_options={"rest": "eager", "kernels": "eager", "proof": "on"})
    assert report.sites[0].proof.startswith("proved")


def process_state():
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    return torch.get_rng_state().tolist(), torch.get_num_threads(), sys.stderr, gc.isenabled(), modes


def test_what_a_trial_sets_is_put_back_where_it_fails(monkeypatch):
    real, seen = compare.executable, []

    def failing(*args):
        def forward(*inputs):
            torch.rand(3)
            seen.append(process_state())
            raise ZeroDivisionError

        made = real(*args)
        made.forward = forward
        return made

    monkeypatch.setattr(compare, "executable", failing)
    torch.set_num_threads(2)
    model, x, before = made(Loop), torch.randn(T, H), process_state()
    with torch.no_grad():
        proof = explained(model, x).sites[0].proof
    assert "ZeroDivisionError" in proof
    assert process_state() == before
    assert all(now != then for now, then in zip(seen[0][:3], before[:3], strict=True))


def test_a_damaged_memory_is_proved_again(tmp_path):
    model, x = made(Loop), torch.randn(T, H)
    explained(model, x)
    (file,) = (tmp_path / "proofs").glob("*.json")
    for text in ("", "{", "{}", '{"status": 1}'):
        file.write_text(text)
        assert explained(model, x).sites[0].proof.startswith("proved in")


def test_sizes_keep_what_is_equal_and_what_is_a_multiple():
    becomes = _assign([768, 1536, 2048, 4096, 2048 * 768], {128}, {1, 2, 128})
    assert becomes[1536] == 2 * becomes[768]
    assert becomes[4096] == 2 * becomes[2048]
    assert becomes[2048 * 768] == becomes[2048] * becomes[768]
    assert becomes[2048] != becomes[768]
    assert len(set(becomes.values())) == len(becomes)
    assert _assign([96 * 128, 96], {128}, {128})  # whatever the order


def test_a_trial_runs_on_one_device_whatever_the_code_names():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.zeros, ((4,),), {"device": torch.device("cuda", 1), "dtype": torch.float32})
    moved = graph.call_method("cuda", (graph.call_function(operator.add, (x, made)),))
    graph.output((graph.call_method("to", (moved, "cuda:1")),))
    half = Half(graph, {"x": "x"})
    module = executable(half, Sizes({}, {}), False, "eager", torch.device("cpu"))
    (y,) = module(torch.ones(4))
    assert torch.equal(y, torch.ones(4))


class Weightless(nn.Module):
    """Tokens go, unweighted, where gates that a scatter filled in are not 0; scores below the mean have none."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 8), nn.ReLU(), nn.Linear(8, H)) for _ in range(4))

    def forward(self, x):
        best, ids = self.router(x).softmax(-1).topk(K, -1)
        gates = torch.zeros(x.shape[0], 4).scatter(1, ids, (best - 0.25).relu())
        pairs = gates.nonzero()
        pairs = pairs[pairs[:, 1].argsort(stable=True)]
        parts = x[pairs[:, 0]].split((gates != 0).sum(0).tolist())
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, pairs[:, 0], rows)


def test_pairs_without_weight_are_tried(monkeypatch):
    x = torch.randn(13, H)
    assert [s.status for s in explained(made(Weightless), x).sites] == ["fused"]
    right = find_experts.weighed_choice

    def keeps_all(lifter, root, name, weight, by_expert):
        _, weights, _ = right(lifter, root, name, weight, by_expert)
        return (), weights, lifter.weighed[name].choice

    monkeypatch.setattr(find_experts, "weighed_choice", keeps_all)
    with pytest.warns(RuntimeWarning, match="computes something else"):
        report = explained(made(Weightless), x)
    assert [s.status for s in report.sites] == ["declined"]
