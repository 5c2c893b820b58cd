"""diff, bisect, repro and routes: on small models, with a rewrite that is wrong on purpose, and bad input."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripts import run_script

import moec.backend
from moec.cli import commands as cli
from moec.errors import ParseError
from moec.sizing.loads import Load, read_loads, write_loads
from moec.tools.blame import Tried

ROOT = Path(__file__).resolve().parents[3]
MODEL = """
import torch
from torch import nn
from moec.demo.forms import make_moe

def stack(n=3):
    torch.manual_seed(0)
    return nn.Sequential(*(make_moe(32, 16, 4, 2, torch.float32) for _ in range(n)))
def make():
    return stack(), (torch.randn(7, 32),)
def one():
    return stack(1), (torch.randn(7, 32),)
def dense():
    return nn.Linear(4, 4), (torch.ones(2, 4),)
def batches():
    return [(torch.randn(5, 32),), torch.randn(9, 32)]
def none():
    return []
class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(32, 4), nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = 0
        for e, expert in enumerate(self.experts):
            y = y + torch.nn.functional.normalize(expert(x)) * ((chosen == e) * weights).sum(-1, keepdim=True)
        return y
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)) for _ in range(4))
    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y
class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe, (self.x,) = one()
        self.register_buffer("steps", torch.zeros(()))
    def forward(self, x):
        self.steps += 1
        return self.moe(x) * self.steps
def counting():
    return Counting(), (torch.randn(7, 32),)
def own():
    return Own(), (torch.randn(7, 32),)
class Some(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(32, 4), nn.Parameter(torch.randn(4, 16, 32))
        self.down = nn.Parameter(torch.randn(4, 32, 16))
    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y, kept = torch.zeros_like(x), weights > 0.3
        for e in range(4):
            token, slot = torch.where((chosen == e) & kept)
            rows = torch.relu(x[token] @ self.up[e].T) @ self.down[e].T
            y.index_add_(0, token, rows * weights[token, slot, None])
        return y
def some():
    return Some(), (torch.randn(7, 32),)
def declined():
    return Masked(), (torch.randn(7, 32),)
"""
NOISY = """
calls = []
def noisy():
    def f(x):
        calls.append(1)
        return x + len(calls)
    return f, (torch.ones(3),)
"""
EAGER = ["--options", "rest=eager"]


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


class Sabotaged:
    """A pass that makes one layer's activation another function: a wrong rewrite, at layer `at` of the graph."""

    def __init__(self, inner, at):
        self.inner, self.at, self.name = inner, at, inner.name

    def run(self, graph, facts):
        outcome = self.inner.run(graph, facts)
        made = [i for i in outcome.graph.instrs if i.word == "experts"]
        if len(made) <= self.at:
            return outcome
        bad = made[self.at]
        attrs = tuple(
            (k, v.replace("gate=", "activation=mul(tanh(a), b); gate=") if k == "spec" else v) for k, v in bad.attrs
        )
        if attrs == bad.attrs:
            attrs = tuple(
                (k, v.replace("experts{", "experts{activation=mul(tanh(a), b); ") if k == "spec" else v)
                for k, v in bad.attrs
            )
        instrs = [replace(i, attrs=attrs) if i is bad else i for i in outcome.graph.instrs]
        return replace(outcome, graph=outcome.graph.with_instrs(instrs))


def data(capsys):
    return json.loads(capsys.readouterr().out)


def test_bisect_agrees_with_eager(model, capsys):
    assert cli.run(["bisect", f"{model}:make", *EAGER, "--json"]) == cli.OK
    found = data(capsys)
    assert found["culprit"] is None
    assert [r.partition(":")[0] for r in found["rewrites"]] == ["find-experts"] * 3 + ["find-routers"] * 3
    assert [t["rewrites"] for t in found["tried"]] == [6]


def test_bisect_begins_each_run_with_the_same_buffers(model, capsys):
    assert cli.run(["bisect", f"{model}:counting", *EAGER, "--json"]) == cli.OK
    assert data(capsys)["culprit"] is None


@pytest.mark.parametrize("at", [0, 2])
def test_bisect_names_the_sabotaged_rewrite(model, capsys, monkeypatch, at):
    passes = tuple(Sabotaged(p, at) if p.name == "find-experts" else p for p in moec.backend.PASSES)
    monkeypatch.setattr(moec.backend, "PASSES", passes)
    assert cli.run(["bisect", f"{model}:make", "--options", "rest=eager,proof=off"]) == cli.BROKEN_PROMISE
    out = capsys.readouterr().out
    assert f"rewrite {at + 1} of 6 changes the answer: find-experts: {at}" in out
    assert f"'fuel': {at}" in out


def test_bisect_compares_gradients(model, capsys):
    model.write_text(
        MODEL.replace("nn.Sequential(*(", "nn.Sequential(*(").replace(
            "for _ in range(n)))", "for _ in range(n))).requires_grad_()"
        )
    )
    assert cli.run(["bisect", f"{model}:one", *EAGER, "--grad", "--json"]) == cli.OK
    assert [r.partition(":")[0] for r in data(capsys)["rewrites"]] == ["find-experts"]


def test_an_answer_that_is_no_number_apart_is_wrong():
    assert [Tried(1, error).wrong for error in (0.5, 1.0, 1.5, float("nan"))] == [False, False, True, True]


def test_bisect_says_when_no_rewrite_is_at_fault(model, capsys):
    model.write_text(MODEL + NOISY)
    assert cli.run(["bisect", f"{model}:noisy", *EAGER]) == cli.BROKEN_PROMISE
    assert "differs without any rewrite" in capsys.readouterr().out


def test_fuel_counts_experts_then_routers(model, capsys):
    for fuel, words in ((2, ["experts", "experts"]), (4, ["moe", "experts", "experts"])):
        assert cli.run(["inspect", f"{model}:make", "--options", f"rest=eager,fuel={fuel}", "--json"]) == cli.OK
        kernels = [s["kernels"][0].partition("_")[0] for s in data(capsys)["sites"] if s["status"] == "fused"]
        assert kernels == words


def test_diff_of_equal_runs_is_empty(model, capsys):
    assert cli.run(["diff", f"{model}:one", *EAGER]) == cli.OK
    assert "no difference" in capsys.readouterr().out


def test_diff_shows_what_an_option_changed(model, capsys):
    assert cli.run(["diff", f"{model}:one", *EAGER, "--other", "rest=eager,fuel=1", "--json"]) == cli.BROKEN_PROMISE
    found = {d["where"]: d["diff"] for d in data(capsys)}
    assert "graph 1, after find-routers" in found
    assert "graph 1, after find-experts" not in found
    assert any(line.startswith("-") and "moe(" in line for line in found["graph 1, after find-routers"].splitlines())


def test_diff_reads_a_saved_run(model, tmp_path, capsys):
    assert cli.run(["inspect", f"{model}:one", *EAGER, "--passes", "--json"]) == cli.OK
    saved = tmp_path / "run.json"
    saved.write_text(capsys.readouterr().out)
    assert cli.run(["diff", str(saved), f"{model}:one", *EAGER]) == cli.OK


@pytest.mark.parametrize(("name", "tokens"), [("make", None), ("declined", None), ("make", 3)])
def test_repro_writes_a_file_that_runs(model, tmp_path, capsys, name, tokens):
    out = tmp_path / "again.py"
    arguments = ["repro", f"{model}:{name}", *EAGER, "--out", str(out), *(["--tokens", str(tokens)] if tokens else [])]
    if name == "declined":
        assert cli.run(arguments) == cli.BAD_INPUT
        assert "no layer is fused" in capsys.readouterr().err
        return
    assert cli.run([*arguments, "1"] if tokens is None else arguments) == cli.OK
    if tokens is None:
        done = subprocess.run([sys.executable, str(out)], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "T=7 H=32 F=16 E=4 k=2" in done.stdout
        return
    done = run_script(out)
    assert done.code == 0, done.err
    assert f"T={tokens} H=32 F=16 E=4 k=2" in done.out


def test_routes_records_every_layer(model, tmp_path, capsys):
    out = tmp_path / "loads.jsonl"
    assert cli.run(["routes", f"{model}:make", "--batches", f"{model}:batches", "--out", str(out)]) == cli.OK
    assert "max / mean" in capsys.readouterr().out
    loads = read_loads(out)
    assert [(load.site, load.tokens, load.k, load.experts) for load in loads] == [
        (f"{i}.experts", 14, 2, 4) for i in range(3)
    ]
    assert all([sum(batch) for batch in load.batches] == [10, 18] for load in loads)


def test_routes_are_the_models_own(model, tmp_path, capsys):
    assert cli.run(["routes", f"{model}:one", "--json"]) == cli.OK
    (load,) = data(capsys)
    space = {}
    exec(MODEL, space)
    moe, (x,) = space["one"]()
    chosen = moe[0].gate(x).softmax(-1).topk(2).indices
    assert load["batches"] == [torch.bincount(chosen.flatten(), minlength=4).tolist()]


def test_routes_of_a_layer_that_is_not_fused(model, capsys):
    assert cli.run(["routes", f"{model}:declined", "--json"]) == cli.OK
    (load,) = data(capsys)
    assert (load["tokens"], load["k"], load["experts"]) == (7, 2, 4)
    assert sum(load["batches"][0]) == 14


def test_routes_of_experts_with_code_of_their_own(model, capsys):
    assert cli.run(["explain", f"{model}:own", *EAGER, "--no-grad"]) == cli.OK
    capsys.readouterr()
    assert cli.run(["routes", f"{model}:own", "--json"]) == cli.OK
    (load,) = data(capsys)
    assert sum(load["batches"][0]) == 14


def test_routes_count_what_is_served(model, capsys):
    assert cli.run(["explain", f"{model}:some", *EAGER, "--no-grad"]) == cli.OK
    capsys.readouterr()
    assert cli.run(["routes", f"{model}:some", "--json"]) == cli.OK
    (load,) = data(capsys)
    space = {}
    exec(MODEL, space)
    layer, (x,) = space["some"]()
    weights, chosen = layer.gate(x).softmax(-1).topk(2)
    kept = chosen[weights > 0.3]
    assert 0 < len(kept) < 14
    assert load["batches"] == [torch.bincount(kept, minlength=4).tolist()]


def test_routes_of_a_dense_model_keep_no_promise(model, capsys):
    assert cli.run(["routes", f"{model}:dense"]) == cli.BROKEN_PROMISE
    assert "no layer's choice" in capsys.readouterr().out


def test_figures_of_loads(tmp_path):
    even = Load("a", 8, 1, 4, ((2, 2, 2, 2),))
    one = Load("b", 8, 1, 4, ((8, 0, 0, 0), (0, 0, 0, 0)))
    assert (even.imbalance, even.entropy, even.idle) == (1.0, 1.0, 0.0)
    assert (one.imbalance, one.entropy, one.idle) == (4.0, 0.0, 3.5)
    write_loads([even, one], tmp_path / "l.jsonl")
    assert read_loads(tmp_path / "l.jsonl") == (even, one)
    (tmp_path / "l.jsonl").write_text('{"site": "a", "tokens": 1, "k": 1, "experts": 2, "batches": [[1]]}\n')
    with pytest.raises(ParseError, match=r"l\.jsonl:1: .*one count for each of 2"):
        read_loads(tmp_path / "l.jsonl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["diff", "none.json", "{model}:one"], ["none.json cannot be read as a run"]),
        (["diff", "{model}:one", "--other", "fuel"], ["--other 'fuel' is not key=value"]),
        (["bisect", "{model}:one", "--tolerance", "0"], ["--tolerance 0 is not a positive number"]),
        (["bisect", "{model}:one", "--tolerance", "nan"], ["--tolerance nan is not a positive number"]),
        (["bisect", "{model}:two"], ["'two' is not defined"]),
        (["repro", "{model}:one", "9", "--out", "/tmp/x.py"], ["no fused layer '9'; there are: 0"]),
        (["repro", "{model}:one", "--out", "/nowhere/x.py"], ["/nowhere does not exist"]),
        (["repro", "{model}:one", "--out", "/tmp"], ["--out /tmp: that is a folder"]),
        (["repro", "{model}:one", "--tokens", "0"], ["--tokens 0 is too small"]),
        (["routes", "{model}:one", "--out", "/nowhere/x"], ["/nowhere does not exist"]),
        (["routes", "{model}:one", "--batches", "{model}:none"], ["gave none"]),
        (["routes", "{model}:one", "--batches", "{model}"], ["does not name a callable"]),
    ],
)
def test_bad_input_is_one_line(model, capsys, arguments, words):
    assert cli.run([a.format(model=model) for a in arguments]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
