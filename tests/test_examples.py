"""Every example runs, three in processes of their own as a reader would start them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import run_script

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = {
    "01_compile.py": ["equal to eager", "gradient of the router"],
    "02_watch_the_passes.py": ["1 fused", "moe @", "raise: 0 rewrites", "@@"],
    "03_explain_a_miss.py": ["1 declined", "not fused, and still equal to eager"],
    "04_library_model.py": ["2 fused", "logits equal to eager"],
    "05_ranks.py": ["gradients of experts [0, 1, 2, 3], equal to eager: True", "[4, 5, 6, 7], equal to eager: True"],
    "06_train.py": ["the same losses, on the model's own parameters"],
    "07_copies_of_weights.py": ["{'freeze': True}", "after a parameter was changed", "copies follow their parameters"],
    "08_generate.py": ["prompt of 21: ", "as eager; graphs compiled so far: 2"],
    "09_data_parallel.py": [
        f"rank {rank}: {n} tokens, gradients as of all tokens on one rank: True" for rank, n in enumerate((13, 20))
    ],
}
BY_ITSELF = ("01_compile.py", "05_ranks.py", "09_data_parallel.py")  # the first, and those that fork


def test_every_example_is_listed():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", BY_ITSELF)
def test_example_by_itself(name):
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for part in EXPECTED[name]:
        assert part in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - set(BY_ITSELF)))
def test_example(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch._dynamo.reset()
    done = run_script(ROOT / "examples" / name)
    assert done.code == 0, done.err[-3000:]
    for part in EXPECTED[name]:
        assert part in done.out, done.out[-3000:]
