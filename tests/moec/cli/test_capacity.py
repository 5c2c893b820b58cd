"""`moec inspect --capacity`: bounds that real runs keep, what drops, sizes from recorded loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moec.cli import commands as cli
from moec.runtime.calls import calls
from moec.sizing.loads import read_loads
from moec.tools.routes import seen_angles

QUICK = ("--options", "rest=eager,kernels=eager,proof=off")  # nothing is built
ROOT = Path(__file__).resolve().parents[3]
CAPACITY = """
import sys
sys.path.insert(0, {tests!r})
from spelling import batches, tokens
from spellings_capacity import Groups, KeptPairs, PickedIndex, Top2

def tight(): return Top2(0.5), tokens(40)
def ample(): return Top2(4.0), tokens(40)
def kept(): return KeptPairs(4.0), tokens(40)
def groups(): return Groups(1.0, random=False), batches(40)
def picked(): return PickedIndex(), tokens(40)
"""


def shown(capsys, *words):
    assert cli.run(["inspect", *words, "--capacity", "--json"]) == cli.OK, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)["capacity"]


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "capacity_models.py"
    path.write_text(CAPACITY.format(tests=str(ROOT / "tests")))
    return path


def formulas(found):
    return {bound["name"]: (bound["formula"], bound["values"]) for bound in found["bounds"]}


@pytest.mark.parametrize(
    ("name", "drops", "rows"),
    [
        ("tight", "possible", ("Min(2*T, Max(4, ceiling(T/4)))", [10, 128])),
        ("ample", "never, proved", ("2*T", [80, 1024])),
        ("kept", "never, proved", ("2*T", [80, 1024])),
        ("picked", "experts choose", ("T/4", [10, 128])),
    ],
)
def test_capacities_are_formulas_in_t(models, capsys, name, drops, rows):
    (found,) = shown(capsys, f"{models}:{name}", "--no-grad", "--tokens", "40..512", *QUICK)
    assert found["drops"].startswith(drops)
    assert formulas(found)["rows of one expert"] == (rows[0], rows[1])


def test_groups_queue_apart(models, capsys):
    (found,) = shown(capsys, f"{models}:groups", "--no-grad", *QUICK)
    assert "groups of tokens" in found["capacity"]
    assert found["drops"].startswith("possible")
    assert formulas(found)["rows of one expert"][1] == [None, None]  # in terms of two sizes, not of T


def test_real_workspaces_keep_the_bounds(capsys):
    target = f"{ROOT}/examples/01_compile.py:make"
    (found,) = shown(capsys, target, "--tokens", "1..200")
    bounds = formulas(found)
    calls().release()
    from moec.tools.loading import load

    made = load(target)
    compiled = torch.compile(made.model, backend="moec", options={"rest": "eager"}, dynamic=True)
    x = torch.randn(200, 64, requires_grad=True)
    y = compiled(x)
    forward = calls().workspace_bytes
    assert forward <= bounds["workspace, forward (C++)"][1][1] <= 1.2 * forward
    calls().release()
    y.sum().backward()
    backward = calls().workspace_bytes
    assert backward <= bounds["workspace, backward (C++)"][1][1] <= 1.2 * backward


def test_sizes_from_recorded_loads(tmp_path, capsys):
    target, loads = f"{ROOT}/examples/01_compile.py:make", tmp_path / "loads.jsonl"
    assert cli.run(["routes", target, "--out", str(loads)]) == cli.OK
    capsys.readouterr()
    (load,) = read_loads(loads)
    assert load.angles is not None
    assert load.angles.pairs == 26
    command = ["inspect", target, "--no-grad", "--capacity", "--loads", str(loads), "--drop-rate", "0.1", "--json"]
    assert cli.run(command) == cli.OK
    (found,) = json.loads(capsys.readouterr().out)["capacity"]
    sized, local = found["sized"], found["local"]
    assert sized["dropped"] <= 0.1
    assert (sized["batches"], sized["pairs"], sized["confidence"]) == (1, 26, 0.95)
    assert local["exact"] >= local["simple"] > 0
    assert local["precondition"] is (load.angles.gates <= 0.1)
    assert cli.run(command[:-1]) == cli.OK
    text = " ".join(capsys.readouterr().out.split())
    for words in ("based on 1 batches, 13 tokens", "95% confidence", "LocMoE's lower bound", "orthogonal gates"):
        assert words in text


def test_angles_are_those_of_the_definition():
    x, gates = torch.randn(13, 8), torch.randn(4, 8)
    chosen = torch.randint(4, (13, 2))
    seen = seen_angles(x, gates, chosen)
    want = torch.cosine_similarity(x[:, None], gates[chosen], dim=-1).reshape(-1)
    torch.testing.assert_close(seen.cosines, want)
    pairs = [torch.cosine_similarity(gates[i], gates[j], dim=0).abs() for i in range(4) for j in range(i)]
    assert seen.gates == pytest.approx(float(max(pairs)), abs=1e-6)
    assert seen_angles(x, torch.eye(8)[:4], chosen).gates == 0.0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tokens", "1..8"], "without --capacity"),
        (["--capacity", "--tokens", "8..1"], "a range such as 1..4096"),
        (["--capacity", "--tokens", "many"], "a range such as 1..4096"),
        (["--capacity", "--loads", "nowhere.jsonl"], "no such file"),
        (["--capacity", "--drop-rate", "0.1"], "--loads FILE"),
    ],
)
def test_bad_input_is_one_line(words, says, capsys):
    assert cli.run(["inspect", f"{ROOT}/examples/01_compile.py:make", *words]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
