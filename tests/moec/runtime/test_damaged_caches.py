"""Caches that are damaged or somebody else's: no reader of them ends with an error, and what is whole is found."""

import json
import os
import random
import warnings
from dataclasses import replace

import pytest
import torch
from damage import as_line, damaged, retyped

from moec.cli import commands as cli
from moec.codegen import triton_emit
from moec.codegen.tuning import Sizes, Tuning
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.proof.store import Verdict, recall, remember
from moec.runtime import tune_cache
from moec.runtime.cpu import load_kernel
from moec.runtime.race import Racer
from moec.runtime.tune_cache import Entry, Key, Made
from moec.runtime.tune_gpu_cache import stored_config

SPEC = str(KernelSpec(ExpertsSpec()))
TUNING = "few=7,7 few_cols=16,16 many_cols=64,64 row_block=192 k_few=1024 k_many=256,256 chunk=1000"
TILES = (
    "block_m=16 block_n=32 block_k=32 group_m=8 num_warps=4 num_stages=1 variant=sorted combine=fused native_fp8=False "
    "weights=pointers programs=0 specialized=False tf32=False"
)
SIZES = Sizes(50, 32, 16, 4, 2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    for cache in (tune_cache._load, tune_cache._report, triton_emit._load):
        cache.cache_clear()
    (tmp_path / "tuned").mkdir()
    return tmp_path


def entries():
    """What tuning and races keep: of a CPU and of the interpreter."""
    kernel = load_kernel(SPEC, None)
    key = kernel.key(SIZES, torch.get_num_threads())
    gpu = Key.of(SPEC, SIZES, 0, tune_cache.INTERPRETER)
    found = [
        Entry(key, kernel.made, best, by, "uniform", "2026-01-02T00:00:00", 90.0, 4.0, 100.0, eager)
        for best, by, eager in ((TUNING, "tune", 0.0), ("default", "race", 120.0), ("eager", "race", 9.0))
    ]
    return [*found, replace(found[0], key=gpu, made=Made(tune_cache.INTERPRETER, "triton", "abc"), best=TILES)]


def check_reading(folder, capsys):
    """All that reads results: kernels, races, and the commands."""
    kernel = load_kernel(SPEC, None)
    stored = kernel._stored(SIZES, 2)
    assert stored is None or isinstance(stored, Tuning)
    config = stored_config(KernelSpec.parse(SPEC), SIZES, None)
    assert config is None or max(config.block_m, config.block_n, config.block_k) <= 1024
    Racer(kernel).run(SIZES, lambda runner: runner)
    for words in (["ls"], ["ls", "--json"], ["export", str(folder / "out.jsonl")]):
        assert cli.run(["cache", *words]) == cli.OK, capsys.readouterr().err
    files = [str(path) for path in sorted((folder / "tuned").glob("*.jsonl"))]
    for words in (*(["import", file] for file in files), ["merge", str(folder / "merged.jsonl"), *files]):
        assert cli.run(["cache", *words]) in (cli.OK, cli.BAD_INPUT)
        assert "Error" not in capsys.readouterr().err  # no exception's name: what is wrong is said in words


@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_files_broken_by_chance(folder, capsys, seed):
    """With a folder and a pipe of such names among them."""
    rng = random.Random(seed)
    made = entries()
    for i in range(25):
        content = "".join(rng.choice(made).to_line() + "\n" for _ in range(rng.randint(1, 3))).encode()
        (folder / "tuned" / f"damaged{i:03}.jsonl").write_bytes(damaged(rng, content))
    (folder / "tuned" / "a folder.jsonl").mkdir()
    mine = replace(made[0], key=replace(made[0].key, T=2048))
    tune_cache.store([mine])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tune_cache.exact(mine.key, mine.made, tune_cache.load()) == mine
        check_reading(folder, capsys)
        assert cli.run(["cache", "clear", "--tuned"]) == cli.OK


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "tuned" / "pipe.jsonl")
    assert tune_cache.read_file(folder / "tuned" / "pipe.jsonl") == ((), "not a file")


@pytest.mark.parametrize("number", range(4))
def test_another_value_at_every_place(folder, capsys, number):
    """What is taken for an entry all the same can be written, shown and used."""
    line = entries()[number].to_line()
    lines = [as_line(value) for value in retyped(json.loads(line))]
    assert len(lines) > 400
    (folder / "tuned" / "all.jsonl").write_bytes(b"".join(lines))
    taken, problem = tune_cache.read_file(folder / "tuned" / "all.jsonl")
    assert problem.startswith("line 1:")
    assert len(taken) < len(lines) / 3
    for entry in taken:
        assert Entry.parse(entry.to_line()) == entry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_reading(folder, capsys)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("block_m=16", f"block_m={1 << 40}"),
        ("num_stages=1", "num_stages=999999999"),
        ("group_m=8", f"group_m={1 << 62}"),
        ("programs=0", "programs=99999999"),
    ],
)
def test_what_no_kernel_takes_is_no_entry(was, now):
    whole = entries()[3].to_line()
    assert was in whole
    assert Entry.parse(whole)
    with pytest.raises(tune_cache.ParseError):
        Entry.parse(whole.replace(was, now))


@pytest.mark.parametrize("seed", range(4))
def test_verdicts_that_were_broken_are_forgotten(folder, seed):
    rng = random.Random(seed)
    whole = Verdict("proved", ("random", "same"), 1e-7, 0.25)
    remember("key", folder, whole)
    assert recall("key", folder) == replace(whole, remembered=True)
    path = folder / "key.json"
    content = path.read_bytes()
    contents = [damaged(rng, content) for _ in range(100)]
    contents += [as_line(value) for value in retyped(json.loads(content))]
    for each in contents:
        path.write_bytes(each)
        found = recall("key", folder)
        if found is not None:
            assert str(found)
            assert found.status in ("proved", "wrong")
            assert all(isinstance(routing, str) for routing in found.routings)


def test_modules_of_kernels_that_were_broken_are_written_anew(folder):
    """Whatever lies there: it is not even text."""
    pytest.importorskip("triton")
    spec, rng = KernelSpec(ExpertsSpec()), random.Random(3)
    triton_emit.load(spec)
    (path,) = (folder / "triton").glob("*.py")
    whole = path.read_bytes()
    for _ in range(20):
        path.write_bytes(damaged(rng, whole))
        triton_emit._load.cache_clear()
        assert triton_emit.load(spec).gate_up
        assert path.read_bytes() == whole
