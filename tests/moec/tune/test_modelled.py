"""`moec tune --target GPU`: ranked by the model, compiled as far as the budget goes, said not to be measured."""

import json
from pathlib import Path

import pytest

from moec.cli import commands as cli
from moec.codegen.plan import Sizes
from moec.gpu.offline import Refused
from moec.gpu.target import gpu_target
from moec.ir.spec import KernelSpec
from moec.tune import modelled as tune_modelled
from moec.tune.modelled import config_text, rank_offline

SPEC = "experts{dtype=bf16} -> bf16"


@pytest.fixture
def compiled(monkeypatch):
    """The jobs that were compiled; a compiler that refuses everything."""
    jobs = []

    def refuse(job, target, cache_dir, timeout=0.0):
        jobs.append(job)
        return Refused("no", "no")

    monkeypatch.setattr(tune_modelled, "compile_offline", refuse)
    return jobs


def test_the_default_is_compiled_whatever_the_budget(compiled):
    ranking = rank_offline(KernelSpec.parse(SPEC), Sizes(64, 256, 128, 8, 2), gpu_target("sm_90"), 0.0, Path())
    assert [job.kernel for job in compiled] == ["gate_up", "down"]
    first, *rest = ranking.candidates
    assert first.problems == ("gate_up: refused: no", "down: refused: no")
    assert rest
    assert all(c.problems is None for c in rest)
    assert ranking.best is first
    texts = [config_text(c.config) for c in ranking.candidates]
    assert any("descriptors" in text for text in texts)
    assert any("programs=" in text for text in texts)


def test_what_is_refused_is_not_taken(compiled, monkeypatch):
    ways = iter([("narrow loads",), ()])
    monkeypatch.setattr(tune_modelled, "_compiled", lambda *_: (1, (), next(ways, ("spills",))))
    ranking = rank_offline(KernelSpec.parse(SPEC), Sizes(64, 256, 128, 8, 2), gpu_target("sm_80"), 60.0, Path())
    assert ranking.best is ranking.candidates[1]


def test_the_command_says_that_nothing_was_measured(compiled, capsys):
    sizes = ["--sizes", "H=256,F=128,E=8,k=2", "--tokens", "64", "--budget", "0.001"]
    assert cli.run(["tune", SPEC, *sizes, "--target", "gfx942", "--json"]) == 0
    (data,) = json.loads(capsys.readouterr().out)
    assert (data["how"], data["target"], data["sizes"]["T"]) == ("modelled, not measured", "gfx942", 64)
    assert cli.run(["tune", SPEC, *sizes, "--target", "gfx942"]) == 0
    assert "modelled, not measured" in capsys.readouterr().out
    assert cli.run(["tune", SPEC, *sizes, "--target", "sm_91"]) != 0
