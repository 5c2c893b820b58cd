"""Experts spread over real processes: one job of four ranks (gloo) with all checks of ranks_job.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("ranks_job.py")
ROOT = JOB.parents[3]
CHECKS = re.findall(r"^def check_(\w+)", JOB.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What each check found, by name."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    folder = str(tmp_path_factory.mktemp("ranks"))
    command = [sys.executable, str(JOB), folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired as stuck:
        out, err = (stuck.stdout or b"").decode(), f"stuck: {(stuck.stderr or b'').decode()}"
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return {each["check"]: each["failed"] for each in found}, err[-3000:]


@pytest.mark.parametrize("name", CHECKS)
def test_check(job, name):
    found, err = job
    assert name in found, f"the job ended before: {err}"
    assert found[name] == {}, "\n".join(f"rank {rank}: {text}" for rank, text in found[name].items())


def test_without_a_process_group_it_is_an_error():
    from moec.errors import OptionError
    from moec.options import Options

    with pytest.raises(OptionError, match=r"experts_over='world': torch.distributed is not initialised; call"):
        Options.make({"experts_over": "world"})
    for lone in ({"placement": "x.json"}, {"ranks_per_node": 2}):
        with pytest.raises(OptionError, match="of no use without experts_over"):
            Options.make(lone)
