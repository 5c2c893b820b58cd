"""The cache of tuning results: what is stored is found, neighbours help, and no damaged file does any harm."""

import json
import random
import warnings
from dataclasses import replace

import pytest
from filelock import FileLock

from moec.cli import commands as cli
from moec.codegen.tuning import Sizes, Tuning, default_tuning
from moec.errors import ParseError
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime import tune_cache
from moec.runtime.cpu import load_kernel
from moec.runtime.tune_cache import Entry, Key, Made, bucket
from moec.target import Target

SPEC = str(KernelSpec(ExpertsSpec()))
ROUTED = str(KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True)))
TUNING = "few=7,7 few_cols=16,16 many_cols=64,64 row_block=192 k_few=1024 k_many=256,256 chunk=1000"
KEY = Key(SPEC, 64, 32, 16, 4, 2, 2, "avx2")
HERE = Made("a cpu", "g++ 12", "abc")


def entry(best=TUNING, key=KEY, made=HERE, date="2026-01-02T00:00:00", **numbers):
    return Entry(
        key, made, best, "tune", "uniform", date, **{"median": 90.0, "spread": 4.0, "default": 100.0} | numbers
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    tune_cache._load.cache_clear()
    tune_cache._report.cache_clear()
    return tmp_path / "tuned"


def test_lines_go_there_and_back():
    for e in (entry(), entry("default"), entry("eager", eager=3.0), entry(made=Made("ünï", "", ""))):
        assert Entry.parse(e.to_line()) == e


def test_buckets_are_powers_of_two():
    assert [bucket(t) for t in (0, 1, 2, 3, 4, 5, 64, 65, 4096)] == [0, 1, 2, 4, 4, 8, 64, 128, 4096]


def test_stored_entries_are_found_and_the_newest_stays(folder):
    assert tune_cache.load() == ()
    tune_cache.store([entry(), entry("default", replace(KEY, T=1))])
    assert len(tune_cache.load()) == 2
    tune_cache.store([entry("default", date="2026-01-03T00:00:00")])
    assert len(tune_cache.load()) == 2
    assert tune_cache.exact(KEY, HERE, tune_cache.load()).best == "default"
    assert sorted(p.suffix for p in folder.iterdir() if p.name != ".lock") == [".jsonl", ".jsonl"]


def test_a_miss_takes_the_nearest_neighbour_and_no_far_one():
    entries = [entry(key=replace(KEY, T=T)) for T in (1, 32, 256)]
    assert tune_cache.nearest(KEY, HERE, entries).key.T == 32
    assert tune_cache.nearest(replace(KEY, T=16), Made("other", "other", "other"), entries).key.T == 32
    assert tune_cache.nearest(replace(KEY, T=8192), HERE, entries) is None
    assert tune_cache.nearest(replace(KEY, H=32 << 4), HERE, entries) is None
    assert tune_cache.nearest(replace(KEY, isa="neon"), HERE, entries) is None
    assert tune_cache.nearest(replace(KEY, weights="int8"), HERE, entries) is None
    assert tune_cache.nearest(replace(KEY, spec=ROUTED), HERE, entries).key.T == 32
    other = str(KernelSpec(ExpertsSpec("bf16"), None, "bf16"))
    assert tune_cache.nearest(replace(KEY, spec=other), HERE, entries) is None


def test_the_verdict_for_eager_is_not_taken_from_a_neighbour():
    assert tune_cache.nearest(KEY, HERE, [entry("eager")]).best == "eager"
    assert tune_cache.nearest(replace(KEY, T=32), HERE, [entry("eager")]) is None


GOOD = entry().to_line()
WRONG = {
    "empty object": "{}",
    "list": "[1]",
    "number": "7",
    "cut": GOOD[: len(GOOD) // 2],
    "another format": GOOD.replace(tune_cache.FORMAT, "another 1"),
    "another version": GOOD.replace(tune_cache.FORMAT, "moec tuned 1").replace(', "O": 0', ""),
    "key without a field": GOOD.replace(', "O": 0', ""),
    "nan": GOOD.replace("90.0", "NaN"),
    "negative": GOOD.replace("90.0", "-90.0"),
    "text for number": GOOD.replace("90.0", '"90"'),
    "true for number": GOOD.replace('"T": 64', '"T": true'),
    "huge": GOOD.replace('"T": 64', '"T": ' + "9" * 5000),
    "tuning no kernel runs": GOOD.replace("few_cols=16,16", "few_cols=15,16"),
    "workspace of terabytes": GOOD.replace("row_block=192", "row_block=99999999"),
    "spec": GOOD.replace("experts{", "expert{"),
    "extra field": GOOD[:-1] + ', "more": 1}',
    "deep": "[" * 100_000,
    "key is a list": GOOD.replace('"key": {', '"key": [{').replace('}, "made"', '}], "made"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_lines_that_are_no_entries_are_refused(name):
    assert WRONG[name] != GOOD
    with pytest.raises(ParseError):
        Entry.parse(WRONG[name])


def damaged(rng, line):
    """One of many ways in which a file can be broken."""
    data = bytearray((line + "\n").encode() * rng.randint(1, 3))
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data) - 1)])
    if kind == 1:
        return rng.randbytes(rng.randrange(1, 4000))
    if kind == 2:
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if kind == 3:
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        del data[a : b + 1]
    if kind == 4:
        data[rng.randrange(len(data)) : 0] = rng.randbytes(rng.randint(1, 50))
    if kind == 5:
        return rng.choice(list(WRONG.values())).encode()
    if kind == 6:
        return bytes(len(data))
    if kind == 7:
        return b"\xef\xbb\xbf" + bytes(data) + b"\x00"
    return bytes(data)


def test_a_hundred_damaged_files_do_no_harm(folder):
    folder.mkdir(parents=True)
    rng = random.Random(7)
    contents = [damaged(rng, GOOD) for _ in range(100)]
    for i, content in enumerate(contents):
        (folder / f"damaged{i:03}.jsonl").write_bytes(content)
    (folder / "a folder.jsonl").mkdir()
    mine = replace(KEY, T=2048)
    tune_cache.store([entry(key=mine)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = tune_cache.load()
        tune_cache._load.cache_clear()
        tune_cache.load()
        whole = {path.name for path in folder.glob("damaged*") if not tune_cache.read_file(path)[1]}
        tune_cache.clear()
    assert tune_cache.exact(mine, HERE, found) is not None
    assert all(isinstance(e.tuning, Tuning | None) for e in found)
    said = [str(w.message) for w in caught]
    assert len(said) == len(set(said)) >= 80  # each once; some damage leaves whole lines
    assert sum("damaged001.jsonl" in text for text in said) <= 1
    left = {p.name: p.read_bytes() for p in folder.glob("damaged*")}
    for i, content in enumerate(contents):
        name = f"damaged{i:03}.jsonl"
        assert left.get(name, content) == content
        assert name in left or name in whole


def test_a_foreign_file_of_an_entrys_name_is_not_replaced(folder):
    tune_cache.store([entry()])
    (path,) = folder.glob("*.jsonl")
    path.write_bytes(b"\x00foreign")
    tune_cache.store([entry("default", date="2026-02-01T00:00:00")])
    with pytest.warns(RuntimeWarning, match=str(path)):
        assert [e.best for e in tune_cache.load()] == ["default"]
    assert path.read_bytes() == b"\x00foreign"
    tune_cache.store([entry("eager", date="2026-02-02T00:00:00")])
    assert [e.best for e in tune_cache.load()] == ["eager"]


def test_a_kernel_takes_the_stored_numbers(folder):
    kernel = load_kernel(SPEC, None)
    sizes = Sizes(50, 32, 16, 4, 2)
    default = default_tuning(kernel.spec, sizes, Target.host(), 2)
    assert kernel._stored(sizes, 2) is None
    tune_cache.store([entry(key=kernel.key(sizes, 2), made=kernel.made)])
    assert kernel._stored(sizes, 2) == replace(Tuning.parse(TUNING), chunk=default.chunk)
    assert kernel._stored(replace(sizes, T=100), 2) is not None
    assert kernel._stored(replace(sizes, T=5000), 2) is None


def test_commands(folder, tmp_path, capsys):
    assert cli.run(["cache", "ls"]) == cli.OK
    assert "0 tuning results" in capsys.readouterr().out
    tune_cache.store([entry(), entry("default", replace(KEY, T=1))])
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert cli.run(["cache", "export", str(one)]) == cli.OK
    assert cli.run(["cache", "clear", "--tuned", "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out.partition("\n")[2]) == {"tuned": 2, "kernels": 0, "proofs": 0}
    assert tune_cache.load() == ()
    newer = entry("default", date="2027-01-01T00:00:00")
    two.write_text(newer.to_line() + "\nrubbish\n")
    assert cli.run(["cache", "merge", str(tmp_path / "both.jsonl"), str(one), str(two)]) == cli.OK
    assert "rubbish" not in (tmp_path / "both.jsonl").read_text()
    assert cli.run(["cache", "import", str(tmp_path / "both.jsonl")]) == cli.OK
    assert tune_cache.exact(KEY, HERE, tune_cache.load()) == newer
    assert cli.run(["cache", "import", str(one)]) == cli.OK
    assert tune_cache.exact(KEY, HERE, tune_cache.load()) == newer
    capsys.readouterr()
    assert cli.run(["cache", "ls", "--json"]) == cli.OK
    assert len(json.loads(capsys.readouterr().out)["tuned"]) == 2
    assert cli.run(["cache", "ls"]) == cli.OK
    assert "a cpu" in capsys.readouterr().out


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def left_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_clear_removes_only_what_moec_wrote(tmp_path, capsys):
    key = "a" * 32
    mine = ("libmine.so", "notes.txt", "proofs/mine.json", "triton/mine.py", "work.new/kernel.cpp")
    put(tmp_path, f"{key}.so", f"{key}.so.lock", f"triton/moec_{key}.py", f"offline/{key}.json.gz", *mine)
    put(tmp_path, f"proofs/{key}.json")
    assert cli.run(["cache", "clear", "--kernels"]) == cli.OK
    assert left_in(tmp_path) == sorted([*mine, f"proofs/{key}.json"])
    assert cli.run(["cache", "clear"]) == cli.OK
    assert left_in(tmp_path) == sorted(mine)
    assert "0 kernels and 1 proofs removed" in capsys.readouterr().out


def test_clear_removes_the_folder_of_a_build_that_was_killed_and_of_no_other(tmp_path):
    killed, working = "a" * 32, "b" * 32
    put(tmp_path, f"{killed}.new/kernel.cpp", f"{working}.new/kernel.cpp")
    with FileLock(tmp_path / f"{working}.so.lock"):
        assert cli.run(["cache", "clear"]) == cli.OK
        assert [path for path in left_in(tmp_path) if path.endswith(".cpp")] == [f"{working}.new/kernel.cpp"]
    assert cli.run(["cache", "clear"]) == cli.OK
    assert left_in(tmp_path) == []
    assert list(tmp_path.glob("*.new")) == []


@pytest.mark.parametrize("content", [None, b"\x00\x01", b"{}\n"])
def test_importing_a_foreign_file_is_one_line_and_exit_code_2(tmp_path, capsys, content):
    path = tmp_path / "foreign.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert cli.run(["cache", "import", str(path)]) == cli.BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1
