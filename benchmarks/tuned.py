"""Tuned configurations that other projects measured on real GPUs and publish in their wheels: fetched, read, split.

Only figures are read: which tile a tuner of theirs found fastest for a shape. Both projects are under Apache-2.0;
nothing of their files is kept here.
"""

import json
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

WHEELS = ("vllm==0.33.0", "sglang==0.5.23")
_FILE = re.compile(r"/E=(\d+),N=(\d+),device_name=([^,]+?)\.json$")
DEVICES = {
    "NVIDIA_H100_80GB_HBM3": "h100", "NVIDIA_H200": "h200", "NVIDIA_A100-SXM4-80GB": "a100", "NVIDIA_B200": "b200",
    "AMD_Instinct_MI300X": "mi300x", "NVIDIA_H20": "h20", "NVIDIA_H20-3e": "h20", "AMD_Instinct_MI325X": "mi325x",
}  # fmt: skip

# The files name E and the width N of an expert's shard, not H and k: those of the public models that have this E, by
# their model cards, first the one whose width is a multiple of N: (E, width, H, k).
MODELS = (
    (8, 14336, 4096, 2), (8, 16384, 6144, 2), (16, 10752, 6144, 4), (16, 14336, 4096, 2), (16, 8192, 5120, 1),
    (32, 1792, 2048, 4), (60, 1408, 2048, 4), (62, 1024, 4096, 6), (64, 2560, 3584, 8), (64, 1408, 2048, 6),
    (64, 1536, 4096, 8), (72, 1536, 4096, 8), (128, 1536, 4096, 8), (128, 768, 2048, 8), (128, 1024, 4096, 8),
    (128, 8192, 5120, 1), (128, 1856, 2688, 6), (128, 2880, 2880, 4), (160, 1536, 5120, 8), (256, 2048, 7168, 8),
    (512, 512, 2048, 10), (512, 5376, 4096, 10),
)  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """One tuning result: device, shape, tokens and the configuration found fastest.

    file names where it stands: results of one file were made in one run and belong to one half of a split.
    """

    file: str
    device: str
    E: int
    F: int
    H: int
    k: int
    T: int
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    @property
    def tile(self):
        return self.block_m, self.block_n, self.block_k


def fetch(folder: Path, wheels=WHEELS) -> list[Path]:
    """The wheels in `folder`, downloaded unless they are there (about 400 MB)."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for wheel in wheels:
        name, _, version = wheel.partition("==")
        if not list(folder.glob(f"{name}-{version}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), wheel]
            subprocess.run(command, check=True)
        found += sorted(folder.glob(f"{name}-{version}-*.whl"))
    return found


def hidden_and_k(E: int, N: int) -> tuple[int, int] | None:
    """(H, k) of the model that a shard of width N of one of E experts is from; None: no public model is known."""
    fitting = [m for m in MODELS if m[0] == E and m[1] % N == 0]
    return fitting[0][2:] if fitting else None


def read(wheels: list[Path]) -> list[Tuned]:
    """The results in bf16 (files that name no other dtype) for known devices and models."""
    results = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                results += _of_file(wheel, archive, name)
    return results


def _of_file(wheel, archive, name):
    found = _FILE.search(name)
    if not found or "moe" not in name or found[3] not in DEVICES:
        return
    E, N = int(found[1]), int(found[2])
    model = hidden_and_k(E, N)
    if model is None:
        return
    for tokens, config in json.loads(archive.read(name)).items():
        if tokens.isdigit() and {"BLOCK_SIZE_M", "num_warps", "num_stages"} <= config.keys():
            tile = tuple(config[f"BLOCK_SIZE_{axis}"] for axis in "MNK")
            rest = (config.get("GROUP_SIZE_M", 1), config["num_warps"], config["num_stages"])
            file = f"{wheel.name.split('-')[0]}/{'/'.join(name.split('/')[-2:])}"
            yield Tuned(file, DEVICES[found[3]], E, N, *model, int(tokens), *tile, *rest)
