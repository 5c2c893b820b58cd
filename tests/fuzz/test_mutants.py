"""Near-identical layers, one thing changed: each is declined or handled correctly, never computed wrongly.

pytest tests/fuzz                      a sample, always the same
pytest tests/fuzz -m mutants -s        all of them, and a summary
"""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter

import mutate
import mutate_source
import pytest
import torch

from moec.backend import Backend
from moec.options import Options
from moec.report import Report

QUICK = {"rest": "eager", "kernels": "eager", "proof": "off"}  # the matcher alone must not let a mutant through
T = 7
STRAIGHT = ("gathered_bmm", "gathered_einsum", "grouped", "dense_bmm", "dense_einsum")
LOOPS = ("where_loop", "mask_loop", "hit_loop", "enumerate_loop", "stacked_loop")
ROUTERS = ("softmax", "sigmoid_bias", "topk_softmax", "groups")
CASES = (
    *((dispatch, "softmax", body) for dispatch in (*STRAIGHT, *LOOPS) for body in ("gated", "interleaved")),
    *((dispatch, router, "plain") for dispatch in ("gathered_bmm", "where_loop") for router in ROUTERS),
)


def sources(grammar):
    for dispatch, router, body in CASES:
        parts = grammar.Parts(
            4, 2, 12, "linear", True, router, "normal", 2.5, dispatch, body, "silu",
            dispatch not in ("grouped", "dense_bmm", "dense_einsum"), "index_add", "none", "residual",
        )  # fmt: skip
        yield f"{dispatch} {router} {body}", dispatch, grammar.write(parts, "float32")


def captured(model, x):
    """The graph of the model as a function of its tensors, and these."""
    graphs = []

    def recorder(gm, inputs):
        graphs.append((gm, [i.detach() for i in inputs]))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=recorder)(x)
    assert len(graphs) == 1
    return graphs[0]


def run(fn, args):
    """What a function computes without gradients; None where it fails."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = fn(*(a.clone() for a in args))
        except Exception:
            return None
    return [y for y in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(y, torch.Tensor)]


def agree(checking, what, fn, args, seen):
    """Compile the mutant, compare with its own eager run; count what became of it."""
    want = run(fn, args)
    if want is None:
        seen["does not run"] += 1
        return
    report = Report()
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=Backend(Options.make(QUICK), report=report), dynamic=False)
    with torch.no_grad():
        try:
            got = compiled(*(a.clone() for a in args))
        except Exception as error:
            raise checking.Wrong(f"{what}: {type(error).__name__}: {str(error)[:500]}") from error
    got = [y for y in (got if isinstance(got, (tuple, list)) else [got]) if isinstance(y, torch.Tensor)]
    assert len(got) == len(want), what
    for g, w in zip(got, want, strict=True):
        off = checking.close(g, w, 2e-4, 1e-3)
        if off:
            raise checking.Wrong(f"{what}: {off}\n{report.sites}")
    seen["fused" if any(s.status == "fused" for s in report.sites) else "left alone"] += 1


def graph_mutants(grammar, checking, folder):
    for name, dispatch, source in sources(grammar):
        if dispatch in STRAIGHT:
            gm, inputs = captured(checking.load(source, folder), torch.randn(T, grammar.H))
            for mutant in mutate.mutants(gm):
                yield f"{name}: {mutant.what}", lambda gm=gm, m=mutant: mutate.mutated(gm, m), inputs


def source_mutants(grammar, checking, folder):
    for name, _dispatch, source in sources(grammar):
        for what, text in mutate_source.mutants(source):
            make = lambda text=text: checking.load(text, folder)  # noqa: E731
            yield f"{name}: {what}\n{text}", make, [torch.randn(T, grammar.H)]


def try_all(checking, found, end):
    seen, wrong = Counter(), []
    for what, make, inputs in found:
        if time.monotonic() > end:
            break
        try:
            fn = make()
        except Exception:
            seen["is no program"] += 1
            continue
        try:
            agree(checking, what, fn, inputs, seen)
        except checking.Wrong as error:
            wrong.append(str(error))
            print(f"\nWRONG {len(wrong)}: {error}", flush=True)
        if sum(seen.values()) % 100 == 0:
            print(f"\n{sum(seen.values())} mutants: {dict(seen)}, wrong {len(wrong)}", flush=True)
    return seen, wrong


@pytest.mark.parametrize("kind", [graph_mutants, source_mutants])
def test_a_sample_of_mutants(kind, grammar, checking, tmp_path):
    everything = list(kind(grammar, checking, tmp_path))
    assert len(everything) > 500
    sample = random.Random(0).sample(everything, 40)
    seen, wrong = try_all(checking, sample, time.monotonic() + 15)
    assert not wrong, "\n\n".join(wrong)
    assert seen["left alone"] + seen["fused"] >= 3, seen


@pytest.mark.mutants
@pytest.mark.parametrize("kind", [graph_mutants, source_mutants])
def test_every_mutant(kind, grammar, checking, tmp_path):
    everything = list(kind(grammar, checking, tmp_path))
    random.Random(1).shuffle(everything)  # a run that is cut off has seen a fair sample
    seen, wrong = try_all(checking, everything, float("inf"))
    print(f"\n{kind.__name__}: {sum(seen.values())} mutants: {dict(seen)}, wrong {len(wrong)}")
    assert not wrong, "\n\n".join(wrong)
