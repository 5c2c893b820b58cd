"""A declared range of T: buffers are taken once for it, calls in it allocate nothing, beyond it is said once."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path

import pytest
import torch
from allocated import allocations, bytes_of
from spelling import E, H, tokens
from spellings_capacity import Counted
from torch import nn

import moec.runtime.ops  # noqa: F401  # registers the ops
from moec.cli import commands as cli
from moec.errors import OptionError
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.ir.token_range import TokenRange
from moec.options import Options
from moec.runtime import reserve as runtime_reserve
from moec.runtime.calls import calls as kept_calls

K, WIDTH = 2, 24
TARGET = """
import sys
sys.path[:0] = {path!r}
import torch
from test_token_range import Dense
from spelling import tokens
def make():
    torch.manual_seed(0)
    return Dense(), tokens(13)
"""
TESTS = Path(__file__).resolve().parents[2]
SPEC = str(KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True)))


class Dense(nn.Module):
    """Every expert on every token, gates of the chosen: no size but T is a symbol."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2), nn.Parameter(torch.randn(E, WIDTH, H) * 0.2)

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).topk(K, dim=-1)
        gates = torch.zeros(x.shape[0], E).scatter(1, chosen, w)
        rows = torch.einsum("tef,efh->teh", torch.einsum("th,ehf->tef", x, self.up).relu(), self.down)
        return torch.einsum("te,teh->th", gates, rows)


@pytest.fixture(autouse=True)
def nothing_reserved():
    torch.manual_seed(0)
    torch._dynamo.reset()
    kept_calls().release()
    runtime_reserve.warn_beyond.cache_clear()


def held():
    """This thread's workspace: where it is and how large."""
    return kept_calls().workspace(0), kept_calls().workspace_bytes


def compiled(model, dynamic=True, **options):
    return torch.compile(model, backend="moec", options={"rest": "aot_eager", **options}, dynamic=dynamic)


def steps(run, model, counts, mark=None):
    """The workspace after a forward and backward pass of each T, whose outputs are eager's."""
    for T in counts:
        (x,) = tokens(T)
        if mark:
            torch._dynamo.mark_dynamic(x, 0, **mark)
        y = run(x)
        y.sum().backward()
        torch.testing.assert_close(y, model(x))
        yield held()


@pytest.mark.parametrize("model", [Dense, lambda: Counted(0.5)], ids=["dense", "capacity"])
def test_one_workspace_serves_the_range(model):
    made = model()
    run = compiled(made, tokens="1..200")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert len(set(steps(run, made, (13, 9, 200, 7, 199)))) == 1


def test_without_a_range_it_grows():
    made = Dense()
    assert len(set(steps(compiled(made), made, (13, 200)))) == 2


def test_the_range_may_be_that_of_the_models_symbol():
    """mark_dynamic(min, max) is enough; a static T wants no range."""
    made = Dense()
    run = compiled(made, dynamic=None)
    mark = {"min": 2, "max": 200}
    assert len(set(steps(run, made, (13, 200, 2), mark))) == 1


def test_beyond_the_range_is_said_once_and_computed():
    made = Dense()
    run = compiled(made, tokens="1..20")
    first = next(steps(run, made, (13,)))
    with pytest.warns(RuntimeWarning, match=r"tokens='1\.\.20'.*declare a wider range") as seen:
        later = list(steps(run, made, (21, 40, 13)))
    assert sum("moec" in str(w.message) for w in seen) == 1
    assert later[0][1] > first[1]
    assert later[1] == later[2]


def test_calls_in_the_range_allocate_their_results_alone():
    params = [torch.randn(8, 2 * 48, 64), torch.randn(8, 64, 48)]
    router = [torch.randn(8, 64)]
    engine = "cpp tokens=1..64"
    torch.ops.moec.moe(torch.randn(3, 64), router, params, K, SPEC, engine)
    for T in (64, 1, 17):
        x = torch.randn(T, 64)
        torch.ops.moec.moe(torch.randn(T, 64), router, params, K, SPEC, engine)  # a plan a size
        taken, results = allocations(lambda x=x: torch.ops.moec.moe(x, router, params, K, SPEC, engine))
        assert sorted(taken) == bytes_of(results)


def test_each_thread_reserves_once():
    params, router = [torch.randn(8, 2 * 48, 64), torch.randn(8, 64, 48)], [torch.randn(8, 64)]
    found: dict[int, list[tuple[int, int]]] = {}

    def calls(name, *counts):
        for T in counts:
            torch.ops.moec.moe(torch.randn(T, 64), router, params, K, SPEC, "cpp tokens=1..200")
            found.setdefault(name, []).append(held())
        kept_calls().release()

    calls(-1, 13)
    threads = [threading.Thread(target=calls, args=(i, 3, 200, 9)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(set(found[i])) for i in range(3)] == [1, 1, 1]
    assert {size for seen in found.values() for _, size in seen} == {found[-1][0][1]}


def test_what_is_shown_is_what_is_reserved(tmp_path, capsys):
    path = tmp_path / "ranged.py"
    path.write_text(TARGET.format(path=[str(TESTS), str(TESTS / "moec" / "runtime")]))
    command = ["inspect", f"{path}:make", "--capacity", "--json", "--options", "rest=aot_eager,tokens=1..200"]
    assert cli.run(command) == cli.OK
    (found,) = json.loads(capsys.readouterr().out)["capacity"]
    (reserved,) = [b for b in found["bounds"] if b["name"].startswith("reserved")]
    assert found["tokens"] == [1, 200]
    made = Dense()
    ((_, size),) = steps(compiled(made, tokens="1..200"), made, (3,))
    assert reserved["values"] == [size] * 2
    assert cli.run([*command[:-1], "rest=aot_eager"]) == cli.OK
    (found,) = json.loads(capsys.readouterr().out)["capacity"]
    assert not any(b["name"].startswith("reserved") for b in found["bounds"])


@pytest.mark.parametrize(("text", "low", "high"), [("1..4096", 1, 4096), ("7", 7, 7), (" 0 .. 3 ", 0, 3)])
def test_ranges_as_text(text, low, high):
    found = TokenRange.parse(text)
    assert (found.low, found.high) == (low, high)
    assert TokenRange.parse(str(found)) == found


@pytest.mark.parametrize("text", ["", "8..1", "many", "1..", "..4", "0", "-1..4", "1..4..8", str(2**31), "1.5"])
def test_bad_ranges_are_one_line(text):
    with pytest.raises(ValueError, match=r"expected one number of tokens or a range such as 1\.\.4096"):
        TokenRange.parse(text)
    if text:
        with pytest.raises(OptionError, match="option tokens="):
            Options.make({"tokens": text})
