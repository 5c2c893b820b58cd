"""moec beside other engines' kernels for one MoE layer, forward: vLLM, SGLang, zentorch, ONNX Runtime.

    python benchmarks/peers/run.py                               # installs them into a folder, then all cells
    python benchmarks/peers/run.py --layers A --tokens 1,64 --dtypes bf16
    python benchmarks/peers/run.py --offline                     # only what was installed before

requirements.txt is installed into `--folder` (default: `peers` in moec's cache), package by package and without
dependencies: the environment that runs this is not changed, and one that cannot be installed here leaves the others.
Each engine runs in a process of its own and is compared with an fp32 reference before it is timed, as in layer.py.
moec reads the weights as they are; with `--freeze` also from its own copy, as the others do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import (
    LAYERS,
    Shape,
    add_race,
    check_names,
    layer_inputs,
    library_block,
    plain_layer,
    race_layers,
    wanted,
    write_race,
)
from engines import ENGINES, way
from rich.console import Console

from moec.compare.measure import environment_line
from moec.compare.ways import MOEC, Way
from moec.compare.worker import Built
from moec.ir.dtypes import DTYPES
from moec.options import Environment

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
INSTALL_SECONDS = 600


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cost = {"repeats": 15, "budget": 120.0, "seconds": 20.0, "patience": 5.0}
    add_race(parser, "peers", tokens="1,8,64,512", dtypes="bf16,f32", **cost)
    parser.add_argument("--freeze", action="store_true", help="also moec with its own copy of the weights")
    parser.add_argument("--offline", action="store_true", help="install nothing")
    parser.add_argument("--folder", type=Path, default=Environment.read().cache_dir / "peers")
    asked = parser.parse_args(arguments)
    check_names(parser, asked, layers=LAYERS, dtypes=DTYPES)
    return asked


def requirements(text: str) -> dict[str, str]:
    """Requirement by package, as requirements.txt lists them."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {line.partition("==")[0]: line for line in lines if line}


def installed(folder: Path, package: str) -> bool:
    """Whether the folder has the package."""
    stem = package.replace("-", "_").lower()
    return any(path.name.lower().startswith(f"{stem}-") for path in folder.glob("*.dist-info"))


def install(folder: Path, offline: bool, say: Console) -> dict[str, str]:
    """Install what is missing; why not, by package."""
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for package, requirement in requirements(REQUIREMENTS.read_text(encoding="utf-8")).items():
        if installed(folder, package):
            continue
        if offline:
            failed[package] = "not installed, and --offline was asked for"
            continue
        say.log(f"installing {requirement}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired:
            failed[package] = f"pip took more than {INSTALL_SECONDS} s"
            continue
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            failed[package] = (errors or done.stderr.splitlines() or ["pip failed"])[-1]
    return failed


def build(shape: Shape, dtype: str, tokens: tuple[int, ...], freeze: bool) -> Built:
    """moec on the library's eager form."""
    torch.set_grad_enabled(False)
    plain, inputs = plain_layer(shape, DTYPES[dtype]), layer_inputs(shape, DTYPES[dtype], tokens)
    call = torch.compile(library_block(shape, "eager", plain), backend="moec", options={"freeze": freeze})
    return Built(lambda x: call(x[None]), inputs, lambda t, y: wanted(plain, inputs[t]).verdict(y))


def ways(
    shape: Shape, dtype: str, tokens: tuple[int, ...], folder: Path, failed: Mapping[str, str], freeze: bool
) -> list[Way]:
    """moec, then each engine that computes this dtype and could be installed."""
    names = [MOEC, f"{MOEC} (freeze)"][: 1 + freeze]
    found = [Way(name, build, (shape, dtype, tokens, i > 0), True) for i, name in enumerate(names)]
    usable = (e for e in ENGINES if dtype in e.dtypes and not failed.keys() & set(e.packages))
    return [*found, *(way(engine, shape, dtype, tokens, folder) for engine in usable)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Install, measure, print tables and what could not be installed, write JSON and the plot."""
    asked = parse(arguments)
    console, say = Console(), Console(stderr=True, highlight=False)
    console.print(environment_line(), highlight=False)
    failed = install(asked.folder, asked.offline, say)
    engines = partial(ways, folder=asked.folder, failed=failed, freeze=asked.freeze)
    with torch.no_grad():
        raced = list(race_layers(asked, engines, console, say))
    for package, why in failed.items():
        console.print(f"{package} could not be installed: {why}", style="dim", highlight=False)
    write_race("peers", raced, asked, say, {"failed": failed})


if __name__ == "__main__":
    main()
