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


def test_train(tmp_path):
    out = tmp_path / "train.json"
    sizes = ["--layers", "tiny", "--tokens", "7,64", "--dtypes", "f32", "--seconds", "0.2", "--repeats", "2"]
    text = run("train.py", *sizes, "--out", str(out))
    assert "limit of this machine" in text
    found = json.loads(out.read_text())
    (rows,) = found["layers"].values()
    assert [row["tokens"] for row in rows] == [7, 64]
    for row in rows:
        assert {"moec", "eager", "grouped_mm"} <= set(row["times"]), row["skipped"]
        assert row["best"] in ("eager", "grouped_mm")
        assert row["limit_ms"] > 0
    for each in (peak for peaks in found["memory"].values() for peak in peaks):
        assert each["gradients_mb"] == pytest.approx(4e-6 * (3 * 8 * 64 * 32 + 8 * 64 + each["tokens"] * 64))


def test_wrong_gradients_are_told(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import torch
    import train

    exact = [torch.ones(3)] * 4
    assert train.verdict(exact, exact, 1e-5) == ""
    found = [exact[0], exact[1] * 1.001, exact[2], exact[3]]
    assert "1.0e-03 of the gradient of router" in train.verdict(found, exact, 1e-5)
    assert "inf of the gradient of down" in train.verdict([*exact[:3], exact[3] / 0], exact, 1e-5)


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
