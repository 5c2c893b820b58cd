"""Every command in the README and the docs is run, or at least exists with the options shown."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from scripts import run_script

from moec.cli import commands as cli

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings its own
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Too long for a test of every commit, or run by other tests: these are parsed, not run.
PARSED = {
    "moec demo": ["moec", "demo", "--help"],
    "moec doctor": ["moec", "doctor", "--help"],  # test_cli_doctor runs it
    "moec tune examples/01_compile.py:make --budget 60": ["moec", "tune", "--help"],  # test_tune runs short ones
    'moec tune "experts{dtype=bf16} -> bf16" --sizes H=2048,F=768,E=64,k=8 --tokens 1,64,512 --budget 120': [
        "moec",
        "tune",
        "--help",
    ],
    "python benchmarks/layer.py --quick": ["python", "benchmarks/layer.py", "--help"],  # test_benchmarks runs tiny ones
    "python benchmarks/train.py --quick": ["python", "benchmarks/train.py", "--help"],
    "python benchmarks/compile_time.py --parts stacked --stacked 8,32": [
        "python",
        "benchmarks/compile_time.py",
        "--help",
    ],
    "python benchmarks/tuner.py --layers A,B --tokens 1,64,512": ["python", "benchmarks/tuner.py", "--help"],
    "python benchmarks/matching_time.py": ["python", "benchmarks/matching_time.py", "--help"],  # test_matching_time
    "python benchmarks/model.py --layers 4 --prompt 512": ["python", "benchmarks/model.py", "--help"],
    "python benchmarks/skew.py --layers B --dtypes f32": ["python", "benchmarks/skew.py", "--help"],
    "python benchmarks/peers/run.py --layers A --tokens 1,64 --dtypes bf16": [
        "python",
        "benchmarks/peers/run.py",
        "--help",
    ],
    "python benchmarks/roofline.py --layers A,B": ["python", "benchmarks/roofline.py", "--help"],
    "python benchmarks/capacity.py --factors 0.25,0.5,1,2,4": ["python", "benchmarks/capacity.py", "--help"],
    "python benchmarks/memory.py --layer A --dtype bf16 --tokens 64": ["python", "benchmarks/memory.py", "--help"],
}


def commands():
    """(page, command) of every line in a sh block, `&&` split, comments dropped."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                for part in line.partition(" #")[0].split("&&"):
                    if part.strip():
                        yield page.name, " ".join(part.split())


ALL = sorted({command for _, command in commands()})


def test_commands_are_found():
    assert len(ALL) >= 12
    assert {"moec demo", "pytest"} <= set(ALL)


def test_set_up_is_exactly_two_commands():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Set-up")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)\n```", section, re.DOTALL)
    assert blocks == ["pip install -e . && moec demo", 'pip install -e ".[test]" && pytest']


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("pip ")])
def test_pip_installs_name_extras_that_exist(command):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = shlex.split(command)
    assert words[:3] == ["pip", "install", "-e"]
    extras = re.fullmatch(r"\.(?:\[(.*)\])?", words[3])
    assert extras is not None
    assert set((extras[1] or "").split(",")) - {""} <= set(project["optional-dependencies"])


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("moec ") and c not in PARSED])
def test_moec_command(command, tmp_path, monkeypatch, capsys):
    # In this process: the same code as the script's, without an import of torch for each command.
    monkeypatch.chdir(ROOT)
    if command.startswith(("moec cache", "moec tune")):  # never the user's own results
        monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
        (tmp_path / "tuned.jsonl").touch()
    for name in ("report.html", "tuned.jsonl", "both.jsonl", "tuned.png", "repro.py", "loads.jsonl", "placed.json"):
        command = command.replace(name, str(tmp_path / name))
    words = shlex.split(command)
    if "--loads" in words:  # what the command before it on that page writes
        recorded = words[words.index("--loads") + 1]
        assert cli.run(["routes", words[2], "--choices", "4096", "--out", recorded]) == cli.OK
        capsys.readouterr()
    assert cli.run(words[1:]) == cli.OK, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(PARSED))
def test_long_command_exists_with_its_options(command):
    assert command in ALL
    words = PARSED[command]
    script, *rest = ["moec/__main__.py", *words[1:]] if words[0] == "moec" else words[1:]
    done = run_script(ROOT / script, *rest)
    assert done.code == 0, done.err[-2000:]
    for option in re.findall(r"--[a-z-]+", command):
        assert option in done.out


def test_every_command_is_of_a_kind_that_is_tested():
    known = ("pip install", "moec ")
    assert [c for c in ALL if not c.startswith(known) and c not in PARSED and c != "pytest"] == []


def test_documented_options_are_the_real_ones():
    from moec.options import Options

    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE)
    assert table == [field.name for field in fields(Options)]
    for name in table:
        assert f"`{getattr(Options(), name)}`" in text
    for name in ("MOEC_CACHE_DIR", "MOEC_CPU_ISA", "CXX"):
        assert f"`{name}`" in text


def test_documented_exit_codes_are_the_real_ones():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == [
        cli.OK,
        cli.BROKEN_PROMISE,
        cli.BAD_INPUT,
        cli.STOPPED,
    ]


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_python_is_valid():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
