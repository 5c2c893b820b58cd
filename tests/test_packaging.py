"""What is on disk is what is packaged, registered and named; and nothing in the compiler knows a model."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings its own
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SHIPPED = (".py", ".hpp", ".cpp", ".j2", ".typed")

# Model families and libraries; the doctor may look whether transformers is installed.
NAMES = re.compile(
    r"mixtral|qwen|deepseek|olmoe|gpt.?oss|llama|granite|phi.?moe|jamba|dbrx|ernie|huggingface|megablocks", re.I
)


def folders():
    """Package name → folder, from the disk: every folder below moec, passes and codegen that holds Python."""
    found = {"moec": ROOT / "moec", "moec.passes": ROOT / "passes", "moec.codegen": ROOT / "codegen"}
    for root in list(found):
        for path in sorted(found[root].rglob("__init__.py")):
            inside = path.parent.relative_to(found[root])
            if inside.parts and not any(p.is_symlink() for p in (found[root] / part for part in inside.parts[:1])):
                found[".".join((root, *inside.parts))] = path.parent
    return found


def test_package_list_is_the_folders_on_disk():
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders())
    mapped = SETUPTOOLS["package-dir"]
    for name, folder in folders().items():
        parent = max((p for p in mapped if f"{name}.".startswith(f"{p}.")), key=len)
        assert ROOT.joinpath(mapped[parent], *name.removeprefix(parent).split(".")[1:]) == folder


@pytest.mark.parametrize("name", ["passes", "codegen"])
def test_rooms_are_relative_links(name):
    link = ROOT / "moec" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")


def test_wheel_holds_every_file(tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: pip install 'setuptools>=77'")
    source = tmp_path / "source"
    copied = ("moec", "passes", "codegen", "pyproject.toml", "README.md", "LICENSE")
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    subprocess.run(["cp", "-a", *(str(ROOT / name) for name in copied), str(source)], check=True)
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", str(source), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("moec-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in folders().items()
        for path in folder.iterdir()
        if path.suffix in SHIPPED or path.name == "py.typed"
    }
    assert len(wanted) > 30
    assert wanted - packed == set()
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_entry_point_loads_and_torch_lists_it():
    (point,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="moec")
    assert callable(point.load())
    assert "moec" in torch._dynamo.list_backends()


def test_console_script_points_at_main():
    assert PROJECT["project"]["scripts"] == {"moec": "moec.__main__:main"}
    from moec.__main__ import main

    assert callable(main)


@pytest.mark.parametrize("package", sorted(folders()))
def test_no_model_or_library_is_known_by_name(package):
    for path in sorted(folders()[package].glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not NAMES.search(line), f"{path.name}:{number}: {line.strip()}"
            if package.startswith(("moec.passes", "moec.codegen", "moec.capture")):
                assert "transformers" not in line, f"{path.name}:{number}: {line.strip()}"


def test_bare_rooms_are_not_importable_names_of_the_project():
    for path in sorted(ROOT.glob("**/*.py")):
        if any(part.startswith(".") for part in path.parts):
            continue
        for line in path.read_text().splitlines():
            assert not re.match(r"\s*(from|import) (passes|codegen)\b", line), f"{path}: {line}"
