"""`moec inspect --exchange`: plans for any number of ranks, placements from recorded choices, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.cli import commands as cli
from moec.exchange.placement import read_placements
from moec.sizing.loads import read_loads

MODEL = f"{Path(__file__).resolve().parents[3]}/examples/05_ranks.py:make"
QUICK = ("--no-grad", "--options", "rest=eager,kernels=eager,proof=off")


def shown(capsys, *words):
    assert cli.run(["inspect", MODEL, "--json", *QUICK, *words]) == cli.OK, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)["exchange"]


@pytest.fixture
def loads(tmp_path, capsys):
    path = tmp_path / "loads.jsonl"
    assert cli.run(["routes", MODEL, "--choices", "200", "--out", str(path), *QUICK[1:]]) == cli.OK
    capsys.readouterr()
    return path


@pytest.mark.parametrize(("text", "schemes"), [("2", 2), ("1024x128", 3), ("8x8", 2), ("6x2", 3)])
def test_plans(capsys, text, schemes):
    (plan,) = shown(capsys, "--exchange", text)
    assert plan["modelled"]
    assert plan["based_on"] == "even random choices"
    assert len(plan["schemes"]) == schemes
    for scheme in plan["schemes"]:
        assert 0 < scheme["rows"]["nodes"] <= scheme["rows"]["ranks"]
        assert scheme["forward"]["ranks"] < scheme["step"]["ranks"]
    once, choice = plan["schemes"][1]["rows"]["ranks"], plan["schemes"][0]["rows"]["ranks"]
    assert once <= choice + 1e-9


def test_a_placement_is_made_of_recorded_choices(capsys, loads, tmp_path):
    (load,) = read_loads(loads)
    assert len(load.choices) == 200
    assert all(len(set(chosen)) == load.k for chosen in load.choices)
    path = tmp_path / "placed.json"
    (plan,) = shown(capsys, "--exchange", "4x2", "--loads", str(loads), "--place", str(path))
    assert {s["placement"] for s in plan["schemes"]} == {"blocks", "by co-activation"}
    read = read_placements(path)
    assert read.ranks == 4
    assert list(read.layers[plan["layer"]].owners) == plan["placed"]


def test_the_table_says_that_it_is_a_model(capsys, loads):
    assert cli.run(["inspect", MODEL, "--no-ir", *QUICK, "--exchange", "4x2", "--loads", str(loads)]) == cli.OK
    out = capsys.readouterr().out
    for part in ("per choice", "per rank", "per node", "by co-activation", "modelled, not measured"):
        assert part in out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--exchange", "1"), "expected RANKS or RANKSxNODES"),
        (("--exchange", "8x3"), "the same number on each node"),
        (("--exchange", "8x0"), "--exchange '8x0'"),
        (("--exchange", "many"), "--exchange 'many'"),
        (("--place", "x.json"), "of no use without --exchange"),
        (("--exchange", "4", "--place", "x.json"), "needs --loads FILE with choices"),
        (("--exchange", "4", "--loads", "none.jsonl"), "no such file"),
        (("--loads", "none.jsonl"), "of no use without --capacity or --exchange"),
    ],
)
def test_bad_input_is_one_line(capsys, words, part):
    assert cli.run(["inspect", MODEL, *QUICK, *words]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


def test_loads_without_choices_place_nothing(capsys, loads, tmp_path):
    lines = [json.loads(line) for line in loads.read_text().splitlines()]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "choices"}) + "\n" for line in lines))
    (plan,) = shown(capsys, "--exchange", "4", "--loads", str(plain))
    assert plan["based_on"].startswith("recorded loads")
    assert plan["placed"] is None
    words = ["--exchange", "4", "--loads", str(plain), "--place", str(tmp_path / "p.json")]
    assert cli.run(["inspect", MODEL, *QUICK, *words]) == cli.BAD_INPUT
    assert "moec routes --choices" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text(plain.read_text().replace(lines[0]["site"], "elsewhere"))
    assert cli.run(["inspect", MODEL, *QUICK, "--exchange", "4", "--loads", str(other)]) == cli.BAD_INPUT
    assert "the loads are of elsewhere" in capsys.readouterr().err
