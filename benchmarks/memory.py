"""Peak resident memory of one layer: eager, torch.compile by itself and moec (compile and run), a process each.

python benchmarks/memory.py --layer A --dtype bf16 --tokens 64
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import LAYERS, RESULTS, plain_layer, write_json
from rich.console import Console

from moec.compare.view import plain_table
from moec.ir.dtypes import DTYPES

DYNAMO = "Dynamo alone"  # torch.compile that compiles nothing: what any backend starts from
WAYS = ("weights only", "eager", DYNAMO, "moec", "inductor")


@dataclass(frozen=True)
class Peak:
    """Megabytes resident at most, and the weights' own size."""

    way: str
    peak_mb: float
    weights_mb: float


def child(way: str, layer: str, dtype: str, tokens: int) -> Peak:
    """What one process does."""
    shape = LAYERS[layer]
    with torch.no_grad():
        plain = plain_layer(shape, DTYPES[dtype])
        x = torch.randn(tokens, shape.hidden).to(DTYPES[dtype])
        if way != "weights only":
            call = plain if way == "eager" else torch.compile(plain, backend="eager" if way == DYNAMO else way)
            for _ in range(2):
                call(x)
    weights = sum(p.numel() * p.element_size() for p in plain.parameters())
    # ru_maxrss counts kilobytes on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return Peak(way, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, weights / 1e6)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run each way in a fresh process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", default="A", help=f"one of {LAYERS}")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ways", default=f"weights only,eager,{DYNAMO},moec")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.layer not in LAYERS:
        parser.error(f"--layer {asked.layer!r} is unknown; expected one of {LAYERS}")
    if asked.child:
        print(json.dumps(asdict(child(asked.child, asked.layer, asked.dtype, asked.tokens))))
        return
    peaks: list[Peak] = []
    for way in asked.ways.split(","):
        if way not in WAYS:
            parser.error(f"--ways {way!r} is unknown; expected of {', '.join(WAYS)}")
        sizes = ["--layer", asked.layer, "--dtype", asked.dtype, "--tokens", str(asked.tokens)]
        command = [sys.executable, str(Path(__file__).resolve()), "--child", way, *sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{way} failed with exit code {done.returncode}:\n{done.stderr}")
        peaks.append(Peak(**json.loads(done.stdout.splitlines()[-1])))
    table = plain_table(f"layer {asked.layer}, {asked.dtype}, {asked.tokens} tokens: peak resident memory")
    for name in ("", "peak MB", "of it weights MB", "beside weights MB"):
        table.add_column(name, justify="right" if name else "left")
    for peak in peaks:
        beside = peak.peak_mb - peak.weights_mb
        table.add_row(peak.way, f"{peak.peak_mb:.0f}", f"{peak.weights_mb:.0f}", f"{beside:.0f}")
    Console().print(table)
    write_json("memory", {"layer": asked.layer, "dtype": asked.dtype, "peaks": [asdict(p) for p in peaks]}, asked.out)


if __name__ == "__main__":
    main()
