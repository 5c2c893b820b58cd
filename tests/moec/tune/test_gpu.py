"""Tuning on a GPU: the same search over configurations of Triton kernels; measured by events, kept, and used."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tune_fakes import Steady, seconds_of

from moec.cli import commands as cli
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig, default_config
from moec.errors import ParseError
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.runtime import tune_cache
from moec.runtime.tune_gpu_cache import gpu_key, gpu_made, stored_config
from moec.tune import gpu as tune_gpu
from moec.tune.gpu import EventClock
from moec.tune.job import Job
from moec.tune.run import finished, tune
from moec.tune.view import report_table, row_of
from moec.tune.worker import Worker

ROOT = Path(__file__).resolve().parents[3]
SPEC = KernelSpec(ExpertsSpec(dtype="bf16"))
SIZES = Sizes(64, 256, 128, 16, 4)
JOB = Job(str(SPEC), SIZES, 2, device="cpu")  # what a GPU would do, in the interpreter


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    tune_cache._load.cache_clear()
    return tmp_path


def test_a_configuration_is_its_text():
    config = GpuConfig(128, 256, 64, num_warps=4, combine="separate", weights="descriptors", programs=132)
    assert GpuConfig.parse(str(config)) == config
    for text in ("", "block_m=16", str(config).replace("=128", "=100"), str(config).replace("False", "no"), "x=1"):
        with pytest.raises(ParseError, match="configuration"):
            GpuConfig.parse(text)


def test_the_fastest_configuration_is_kept_and_found_again():
    result = tune(JOB, 1e9, Steady)
    best = min(result.candidates, key=seconds_of)
    assert result.candidates[0] == str(default_config(SPEC, SIZES, tune_gpu.gpu_target("sm_90")))
    assert result.entry.best == best
    assert (result.entry.key.isa, result.entry.config) == ("interpreter", GpuConfig.parse(best))
    assert result.entry.tuning is None
    assert stored_config(SPEC, SIZES, None) == GpuConfig.parse(best)
    assert stored_config(SPEC, Sizes(8, 256, 128, 16, 4), None) is None  # three doublings away
    assert tune_cache.Entry.parse(result.entry.to_line()) == result.entry
    (search,) = finished()
    assert (search[0], search[1]) == (JOB, result.candidates)
    assert row_of(search).where == "cpu"
    assert report_table([search]).row_count == 1


def test_a_winner_with_wrong_results_is_left_out():
    texts = tune_gpu.gpu_texts(JOB)
    best = min(texts, key=seconds_of)
    result = tune(JOB, 1e9, lambda job: Steady(job, wrong=(best,)))
    assert result.entry.best == min((t for t in texts if t != best), key=seconds_of)


def serve(pipe, job):
    """The second question breaks the device for this process: later ones have wrong answers."""
    asked = 0
    while True:
        try:
            word, _ = pipe.recv()
        except EOFError:
            return
        asked += word == "measure"
        pipe.send(("ok", 0.0 if word == "start" else 1.0) if asked < 2 else ("broken", "illegal memory access"))


def test_a_broken_device_costs_one_candidate():
    worker = Worker(JOB, serve)
    try:
        assert worker.ask("measure", "a") == ("ok", 1.0)
        assert worker.ask("measure", "b") == ("failed", "illegal memory access")
        assert worker.ask("measure", "c") == ("ok", 1.0)  # in a new process
    finally:
        worker.close()


def test_events_surround_the_replay_alone(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 2.0  # milliseconds

    class Graph:
        def replay(self):
            done.append("replay")

    class Recording:
        def __init__(self, graph):
            pass

        def __enter__(self):
            done.append("record")

        def __exit__(self, *_):
            done.append("recorded")

    cuda = {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 10),
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Recording,
        "synchronize": lambda device: done.append("wait"),
        "device": lambda device: Recording(None),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(tune_gpu, "_COLD", 64)
    clock = EventClock(torch.device("cpu"))
    clock._cold = SimpleNamespace(zero_=lambda: done.append("flush"))
    assert clock.seconds(lambda: done.append("call"), lambda i: done.append(f"route {i}")) == 2e-3
    begin = done.index("route 0")
    assert done[1:begin] == ["call", "wait", "record", "call", "recorded"]
    assert done[begin : begin + 6] == ["route 0", "flush", "event", "replay", "event", "wait"]
    turns = [f"route {i}" for i in range(3)]
    assert [each for each in done[begin + 6 :] if each.startswith("route")] == turns  # 4 ms of calls, at least 3


def test_an_entry_of_a_gpu_must_be_a_configuration():
    made, key = gpu_made(SPEC, None), gpu_key(SPEC, SIZES, None)
    entry = tune_cache.Entry(key, made, "default", "tune", "uniform", "2026-01-01", 1.0, 0.0, 1.0)
    assert tune_cache.Entry.parse(entry.to_line()).config is None
    with pytest.raises(ParseError, match="configuration"):
        tune_cache.Entry.parse(entry.to_line().replace('"best": "default"', '"best": "few=1,1"'))


def test_without_a_gpu_the_command_says_what_to_do(capsys):
    sizes = ["--sizes", "H=32,F=16,E=4,k=2"]
    for device, words in (("cuda", "--target"), ("cpu", "expected a GPU"), ("nothing", "expected a GPU")):
        if device != "cuda" or not torch.cuda.is_available():
            assert cli.run(["tune", "experts{dtype=bf16} -> bf16", *sizes, "--device", device]) == cli.BAD_INPUT
            assert words in capsys.readouterr().err


def test_the_command_measures_and_keeps(folder):
    """The whole path, with the interpreter in the place of a GPU."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "moec", "tune", "experts{} -> f32", "--sizes", "H=16,F=16,E=2,k=1"]
    command += ["--tokens", "1", "--device", "cpu", "--budget", "0.1", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads(done.stdout)
    assert (found["key"]["isa"], found["best"]) == ("interpreter", "default")
    assert found["median"] > 0
    assert len(tune_cache.load()) == 1


def test_parameters_are_made_as_they_are_stored(monkeypatch):
    monkeypatch.setattr(tune_gpu, "load_triton", lambda spec, device: None)  # nothing is launched
    spec = KernelSpec(ExpertsSpec(gate="none", activation="relu(a)", layout_in="kn", layout_out="kn"))
    bench = tune_gpu.GpuBench(Job(str(spec), Sizes(8, 32, 16, 4, 2, 24), 2, device="cpu"))
    assert [tuple(p.shape) for p in bench.params] == [(4, 32, 16), (4, 16, 24)]
