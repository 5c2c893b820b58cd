"""Unmodified library models: every MoE layer fused, one graph, the model's own answer."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled

zoo = pytest.importorskip("zoo")
pytest.importorskip("transformers")

QUICK = {"rest": "eager"}  # what surrounds the MoE layers is not on trial here


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("name", "implementation"), zoo.CASES)
def test_all_layers_are_fused_in_one_graph_with_equal_logits(name, implementation):
    model, ids = zoo.library_model(name, implementation), zoo.prompt(13)
    run, report = compiled(model)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = run(ids, use_cache=False).logits
    assert report.graphs == 1, report.graph_breaks
    assert [s.status for s in report.sites] == ["fused"] * zoo.MODELS[name][2], report
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("name", zoo.MODELS)
def test_logits_in_bf16(name):
    model, ids = zoo.library_model(name, "eager", torch.bfloat16, layers=1), zoo.prompt(13)
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = torch.compile(model, backend="moec", options=QUICK)(ids, use_cache=False).logits
    assert relative_error(got, want) <= 2e-2


@pytest.mark.parametrize("name", zoo.MODELS)
def test_greedy_decoding_with_a_cache_is_identical(name):
    model, ids = zoo.library_model(name, "eager", layers=1), zoo.prompt(5, batch=1)
    torch._dynamo.reset()
    with torch.no_grad():
        want = model.generate(ids, max_new_tokens=32, do_sample=False, use_cache=True)
        model.forward = torch.compile(model.forward, backend="moec", options=QUICK)
        got = model.generate(ids, max_new_tokens=32, do_sample=False, use_cache=True)
    assert torch.equal(got, want)


def test_with_inductor_for_the_rest():
    model, ids = zoo.library_model("qwen3_moe", "eager"), zoo.prompt(13)
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = torch.compile(model, backend="moec")(ids, use_cache=False).logits
    assert relative_error(got, want) <= 1e-5
