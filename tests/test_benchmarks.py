"""The benchmarks run, with sizes so small that their figures mean nothing; timings decide nothing here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("transformers")


def run(name, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_layer(tmp_path):
    out = tmp_path / "layer.json"
    sizes = ["--layers", "tiny", "--tokens", "1,7", "--dtypes", "f32", "--seconds", "0.2", "--repeats", "2"]
    text = run("layer.py", *sizes, "--no-inductor", "--out", str(out))
    assert "limit of this machine" in text
    (rows,) = json.loads(out.read_text())["layers"].values()
    assert [row["tokens"] for row in rows] == [1, 7]
    for row in rows:
        assert {"moec", "eager", "grouped_mm", "batched_mm"} <= set(row["times"]), row["skipped"]
        assert row["best"] in ("eager", "grouped_mm", "batched_mm")
        assert row["limit_ms"] > 0


def test_compile_time(tmp_path):
    out = tmp_path / "compile.json"
    run("compile_time.py", "--parts", "stacked,separate", "--stacked", "4", "--separate", "4", "--out", str(out))
    compiles = json.loads(out.read_text())["compiles"]
    assert [one["what"] for one in compiles] == ["stacked, loop", "ModuleList, loop"]
    assert all(one["seconds"] > 0 for one in compiles), compiles


def test_memory(tmp_path):
    out = tmp_path / "memory.json"
    text = run(
        "memory.py", "--layer", "tiny", "--dtype", "f32", "--tokens", "7", "--ways", "eager,moec", "--out", str(out)
    )
    assert "peak MB" in text
    assert [peak["way"] for peak in json.loads(out.read_text())["peaks"]] == ["eager", "moec"]


def test_bad_names_are_refused():
    command = [sys.executable, str(ROOT / "benchmarks" / "layer.py"), "--layers", "Z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'Z' is unknown" in done.stderr
