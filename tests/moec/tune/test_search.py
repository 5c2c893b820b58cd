"""Tuning: halving decides rightly, a crash costs one candidate, and a killed search ends as if it had not been."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tune_fakes
from tune_fakes import JOB, Steady, seconds_of

from moec.cli import commands as cli
from moec.codegen.tuning import Sizes, Tuning, candidates
from moec.errors import MoecError, OptionError, TargetError
from moec.ir.spec import KernelSpec
from moec.runtime import tune_cache
from moec.runtime.cpu import load_kernel
from moec.target import Target
from moec.tune.job import Job, routing, shares
from moec.tune.run import finished, journal_path, tune
from moec.tune.search import MARGIN, Record, search
from moec.tune.view import plot, rank_correlation, report_table, row_of
from moec.tune.worker import Bench, Worker

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    tune_cache._load.cache_clear()
    return tmp_path


def hold(talk, time_of, spent=0.001):
    """Answer a search's questions; returns its decision and the questions."""
    asked = []
    try:
        question = next(talk)
        while True:
            asked.append(question)
            answer = time_of(question, len(asked))
            record = (
                Record(question, 0.0, spent, answer) if isinstance(answer, str) else Record(question, answer, spent)
            )
            question = talk.send(record)
    except StopIteration as end:
        return end.value, asked


def test_the_fastest_wins_with_few_measurements_of_the_slow():
    decision, asked = hold(search(16, 1e9), lambda c, _: 1.0 if c == 11 else 2.0 + c)
    assert decision.winner == 11
    assert asked.count(11) > 3 * asked.count(15)
    assert [s.candidate for s in decision.standings][:2] == [11, 0]


def test_the_default_stays_unless_beaten_by_the_margin():
    def near(share):
        return hold(search(8, 1e9), lambda c, _: {0: 1.0, 5: 1.0 - share}.get(c, 2.0))[0].winner

    assert near(MARGIN / 2) == 0
    assert near(MARGIN * 1.5) == 5


def test_noise_does_not_unseat_the_default():
    rng = random.Random(3)
    wins = sum(hold(search(16, 1e9), lambda c, _: rng.gauss(1.0, 0.02))[0].winner != 0 for _ in range(20))
    assert wins <= 2


def test_a_neighbour_s_load_decides_nothing():
    """Load makes all slow for some turns: medians of unlike turns would prefer what was measured in between."""
    rng = random.Random(5)
    wins = []
    for _ in range(20):
        load = [rng.choice((1.0, 1.0, 1.6, 2.5)) for _ in range(4000)]
        talk = search(32, 240.0)
        wins.append(hold(talk, lambda c, n, load=load: load[n // 8] * rng.gauss(1.0, 0.05), spent=1.0)[0].winner)
    assert sum(w != 0 for w in wins) <= 1

    def time_of(candidate, turn):
        return load[turn // 8] * rng.gauss(0.8 if candidate == 9 else 1.0, 0.03)

    won = [hold(search(32, 600.0), time_of, spent=1.0)[0].winner for _ in range(5)]
    assert won.count(9) >= 4


def test_what_the_budget_cannot_halve_is_not_tried():
    _, asked = hold(search(200, 60.0), lambda c, _: 1.0, spent=0.25)
    tried = max(asked) + 1
    assert tried * (1 + math.ceil(math.log2(tried / 4))) * 0.25 <= 60 < 200 * 0.25 * 2
    assert tried > 30
    assert asked.count(0) >= 15, "the last few are measured often"
    assert max(hold(search(200, 1.0), lambda c, _: 1.0, spent=0.5)[1]) <= 3
    assert max(hold(search(3, 1.0), lambda c, _: 1.0, spent=0.5)[1]) <= 2


def test_the_budget_ends_the_search_and_one_measurement_does_not_win():
    decision, asked = hold(search(8, 1.0), lambda c, _: 1.0 if c == 3 else 2.0, spent=0.125)
    assert len(asked) == 8
    assert decision.winner == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_candidates_are_measured_as_often_as_the_default(count):
    decision, asked = hold(search(count, 1e9), lambda c, _: 1.0 - 0.1 * c)
    assert decision.winner == count - 1
    assert asked.count(0) == asked.count(count - 1) >= 24
    assert asked[: count + 1] == [*range(count), 0]


def test_failures_cost_one_candidate():
    decision, _ = hold(search(8, 1e9), lambda c, _: "crashed" if c in (2, 5) else 1.0 - 0.05 * c)
    assert decision.winner == 7
    assert {s.candidate for s in decision.standings if s.failed} == {2, 5}
    assert hold(search(4, 1e9), lambda c, _: "crashed" if c == 0 else 1.0)[0].winner == 1
    assert hold(search(4, 1e9), lambda c, _: "crashed")[0].winner == 0


def test_the_winner_is_kept_and_the_search_reported(folder):
    result = tune(JOB, 1e9, Steady)
    found = candidates(KernelSpec.parse(JOB.spec), JOB.sizes, Target.host(), JOB.threads)
    best = min(map(str, found), key=seconds_of)
    assert result.entry.best == (best if seconds_of(best) < 0.97 * seconds_of(str(found[0])) else "default")
    assert tune_cache.load() == (result.entry,)
    assert result.entry.default == pytest.approx(1e6 * seconds_of(str(found[0])), rel=1e-3)
    ((job, texts, decision),) = finished()
    assert (job, texts, decision) == (JOB, result.candidates, result.decision)
    row = row_of((job, texts, decision))
    assert row.gain == pytest.approx(seconds_of(texts[0]) / min(map(seconds_of, texts)), rel=1e-6)
    assert report_table([(job, texts, decision)]).row_count == 1
    assert plot(finished(), folder / "plot.png").stat().st_size > 5000
    assert cli.run(["tune", "report"]) == cli.OK


def test_a_kernel_uses_what_was_tuned():
    result = tune(JOB, 1e9, Steady)
    kernel = load_kernel(JOB.spec, None)
    plan, _ = kernel._make_plan(tuple(vars(JOB.sizes).values()), torch.float32, 256, True, JOB.threads)
    assert str(plan.tuning) == result.entry.best != result.candidates[0]


def test_a_winner_with_wrong_results_is_not_kept():
    right = tune(JOB, 1e9, Steady).entry
    second = tune(JOB, 1e9, lambda job: Steady(job, wrong=(right.best,))).entry
    assert second.best != right.best
    assert second.median > right.median
    every = [str(t) for t in candidates(KernelSpec.parse(JOB.spec), JOB.sizes, Target.host(), JOB.threads)]
    assert tune(JOB, 1e9, lambda job: Steady(job, wrong=every[1:])).entry.best == "default"
    with pytest.raises(MoecError, match="default plan cannot be used"):
        tune(JOB, 1e9, lambda job: Steady(job, wrong=every))


def test_a_failure_of_the_default_is_not_remembered(folder):
    every = [str(t) for t in candidates(KernelSpec.parse(JOB.spec), JOB.sizes, Target.host(), JOB.threads)]
    with pytest.raises(MoecError, match="default plan cannot be used"):
        tune(JOB, 1e9, lambda job: Steady(job, wrong=every))
    assert not list((folder / "tuning").glob("*.jsonl"))
    assert tune(JOB, 1e9, Steady).resumed == 0


def test_a_cache_that_cannot_be_written_is_bad_input(folder):
    (folder / "tuning").touch()
    with pytest.raises(TargetError, match=r"tuning: .*set MOEC_CACHE_DIR"):
        tune(JOB, 1e9, Steady)


def test_a_crash_and_a_hang_cost_one_candidate_each():
    job = replace(JOB, sizes=Sizes(400, 256, 128, 16, 4))
    texts = [str(t) for t in candidates(KernelSpec.parse(job.spec), job.sizes, Target.host(), job.threads)]
    crashes = [t for t in texts if "few=0,0" in t and "row_block=48 " not in t]
    assert crashes
    block = f"row_block={Tuning.parse(texts[0]).row_block} "
    worker = Worker(job, tune_fakes.serve, patience=3.0)
    try:
        assert worker.ask("measure", texts[0]) == ("ok", seconds_of(texts[0]))
        assert worker.ask("measure", crashes[0]) == ("failed", "the process ended with code 7")
        assert worker.ask("measure", texts[0].replace(block, "row_block=48 "))[1] == "no answer within 3 s"
        assert worker.ask("measure", texts[0]) == ("ok", seconds_of(texts[0]))
    finally:
        worker.close()


def test_the_real_worker_measures_and_checks(monkeypatch):
    job = Job(JOB.spec, Sizes(13, 32, 48, 4, 2), 1, "zipf:1.5")
    bench = Bench(job)
    texts = [str(t) for t in candidates(KernelSpec.parse(job.spec), job.sizes, Target.host(), 1)]
    assert bench.measure(texts[-1]) > 0
    assert [bench.check(text) for text in texts] == [""] * len(texts)
    monkeypatch.setattr(bench, "spec", replace(bench.spec, experts=replace(bench.spec.experts, activation="mul(a, b)")))
    assert "relative error" in bench.check(texts[0])


@pytest.mark.parametrize("weights", ["packed", "int8:16"])
def test_kernels_over_copies_are_tuned_apart(weights):
    job = Job(JOB.spec, Sizes(13, 32, 48, 4, 2), 1, weights=weights)
    bench = Bench(job)
    texts = [str(t) for t in candidates(KernelSpec.parse(job.spec), job.sizes, Target.host(), 1)]
    assert bench.measure(texts[-1]) > 0
    assert bench.check(texts[-1]) == ""
    entry = tune(job, 1e9, Steady).entry
    assert entry.key == bench.kernel.key(job.sizes, 1)
    assert entry.made == bench.kernel.made
    assert bench.kernel._stored(job.sizes, 1) == entry.tuning
    assert load_kernel(job.spec, None)._stored(job.sizes, 1) is None


def test_profiles(tmp_path):
    job = Job(JOB.spec, Sizes(4000, 8, 8, 8, 2), 1, "zipf:1.2")
    counts = torch.bincount(routing(job, 0).flatten(), minlength=8)
    assert counts[0] > counts[3] > counts[7] > 0
    path = tmp_path / "counts.json"
    path.write_text("[0, 0, 5, 5, 0, 0, 0, 5]")
    chosen = routing(replace(job, profile=str(path)), 0)
    assert set(chosen.flatten().tolist()) == {2, 3, 7}
    assert (chosen[:, 0] != chosen[:, 1]).all()
    assert shares("uniform", 8).tolist() == [0.125] * 8
    for bad in ("zipf:x", "nowhere.json", "unifrom"):
        with pytest.raises(OptionError, match="profile"):
            shares(bad, 8)
    for text in ("[1, 2]", "[-1, 1, 1, 1, 1, 1, 1, 1]", "{}", "x", "[0,0,0,0,0,0,0,0]"):
        path.write_text(text)
        with pytest.raises(OptionError, match="profile"):
            shares(str(path), 8)


def test_two_searches_of_one_layer_do_not_mix(folder):
    class Second(Steady):
        def ask(self, word, text=""):
            with pytest.raises(TargetError, match="another `moec tune`"):
                tune(JOB, 1e9, Steady)
            return super().ask(word, text)

    assert tune(JOB, 0.001, Second).entry.best == "default"


def test_rank_correlation_is_one_for_the_same_order_and_minus_one_for_the_reverse():
    assert rank_correlation([2, 5, 9]) == 1
    assert rank_correlation([9, 5, 2]) == -1
    assert -1 < rank_correlation([5, 2, 9]) < 1


@pytest.mark.parametrize("damage", [b"\x00\xff", b"[]\n", b'{"record": 1}\n', b'{"texts": []}\n', b""])
def test_a_damaged_journal_is_begun_anew(folder, damage):
    want = tune(JOB, 1e9, Steady).entry
    path = journal_path(JOB, folder / "tuning")
    path.write_bytes(damage)
    result = tune(JOB, 1e9, Steady)
    assert (result.resumed, result.entry.best) == (0, want.best)


def killed_and_resumed(folder, kills, seed=0):
    """The entries of a search that was killed `kills` times, at random moments, and then left to end."""
    rng = random.Random(seed)
    env = {**os.environ, "MOEC_CACHE_DIR": str(folder), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    total = 0
    for kill in range(kills + 1):
        command = [sys.executable, "-m", "tune_fakes"]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            if kill < kills:
                after = total + rng.randint(1, max(2, 300 // kills))
                for line in process.stdout:
                    if int(line) >= after:
                        break
                process.kill()
                total = after
                journal = journal_path(JOB, folder / "tuning")
                if journal.exists() and rng.random() < 0.5:  # as if killed in the middle of a write
                    with journal.open("ab") as file:
                        file.write(b'{"record": {"cand')
            else:
                process.communicate()  # to leave would close the pipe that the search still writes to
    return [replace(e, date="") for e in tune_cache.load(folder / "tuned")]


def check_kills(tmp_path, kills, seed=0):
    want = replace(tune(JOB, 1e9, Steady).entry, date="")
    assert killed_and_resumed(tmp_path / "killed", kills, seed) == [want]
    (log,) = (tmp_path / "killed" / "tuning").glob("*.done")
    (once,) = (tmp_path / "tuning").glob("*.done")

    def answers(path):
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        return [(x["record"]["candidate"], x["record"]["seconds"]) if "record" in x else x for x in lines]

    assert answers(log) == answers(once)  # nothing was measured twice, nothing was lost


def test_killed_and_resumed_ends_with_the_same_cache(tmp_path):
    check_kills(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_and_resumed_twenty_times_ends_with_the_same_cache(tmp_path, seed):
    check_kills(tmp_path, 20, seed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experts{} -> f99"], ["SPEC", "f32|bf16|f16"]),
        (["experts{gate=x} -> f32"], ["gate='x'"]),
        (["experts{} -> f32", "--sizes", "H=1"], ["--sizes lacks F, E, k"]),
        (["experts{} -> f32", "--sizes", "H=8,F=8,E=2,k=3"], ["k=3 is more than E=2"]),
        (["experts{} -> f32", "--sizes", "T=8,H=8,F=8,E=2,k=2"], ["--sizes 'T=8,", "--tokens 1,8,64"]),
        (
            ["experts{gate=none; activation=relu(a); out=False} -> f32", "--sizes", "H=8,F=6,E=2,k=1,O=8"],
            ["--sizes O=8", "F=6"],
        ),
        (["experts{} -> f32", "--profile", "ziff"], ["profile 'ziff'"]),
        (["experts{} -> f32", "--budget", "0"], ["--budget 0"]),
        (["experts{} -> f32", "--budget", "nan"], ["--budget nan"]),
        (["experts{} -> f32", "--weights", "int4"], ["weights='int4'"]),
        (["experts{} -> f32", "--weights", "fp8"], ["--weights fp8", "--device cuda"]),
        (["experts{} -> f32", "--weights", "packed", "--target", "sm_90"], ["--weights packed", "only C++ kernels"]),
        (["experts{} -> f32", "--target", "sm_90", "--device", "cuda"], ["--device cuda", "--target sm_90"]),
        (["experts{} -> f32", "--target", "sm_90", "--plot", "a.png"], ["--plot a.png", "--target sm_90"]),
        (["report", "--plot", "/nonexistent/a.png"], ["--plot", "/nonexistent does not exist"]),
        (["nowhere.py:make"], ["does not exist"]),
        (["experts{} -> f32", "--tokens", "0"], ["--tokens '0'"]),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    assert cli.run(["tune", *arguments]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_the_command_tunes_a_spec(capsys):
    sizes = ["--sizes", "H=32,F=16,E=4,k=2", "--tokens", "3", "--budget", "0.3", "--json"]
    assert cli.run(["tune", "experts{} -> f32", *sizes]) == cli.OK
    (found,) = json.loads(capsys.readouterr().out)
    assert found["key"]["T"] == 4
    assert found["median"] > 0
    assert len(tune_cache.load()) == 1
    assert finished()[0][0].sizes == Sizes(3, 32, 16, 4, 2)
    assert Tuning.parse(finished()[0][1][0])
