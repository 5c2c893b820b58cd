"""Blocks that wait for others, in machine code: they look again and again, and what they waited for is written."""

import re

import pytest

from moec.codegen.plan import Sizes
from moec.gpu.offline import Compiled, compile_offline
from moec.gpu.target import gpu_target
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.kernels.jobs import Request, kernel_jobs

SPEC = KernelSpec(ExpertsSpec("bf16"), RouterSpec(renormalize=True), "bf16")
SIZES = Sizes(64, 256, 128, 16, 2)
COUNTERS = {"route": "20", "down": "8"}  # bytes before the counter that is waited for: CHOSEN, DONE


def assembly(target, name, folder):
    found = next(each for each in kernel_jobs(Request(SPEC, SIZES, target)) if each.launch.kernel == name)
    made = compile_offline(found.job, target, folder)
    assert isinstance(made, Compiled), made
    return made.assembly


@pytest.mark.parametrize("kernel", COUNTERS)
def test_on_amd(tmp_path, kernel):
    """A plain load, volatile or not, is read once before the loop; a barrier does not wait for stores of other waves,
    nor does a release."""
    text, at = assembly(gpu_target("gfx942"), kernel, tmp_path), COUNTERS[kernel]
    load = rf"global_(?:load_dword|atomic_or) [^\n]*offset:{at} sc[01]\n\s*s_waitcnt vmcnt\(0\)\n\s*buffer_inv sc1"
    assert len(re.findall(rf"Inner Loop Header(?:(?!Loop Header|s_endpgm).)*?{load}", text, re.DOTALL)) == 1
    waits = rf"offset:24\n.*?s_waitcnt vmcnt\(0\)\n.*?s_barrier\n.*?global_atomic_add [^\n]*offset:{at}"
    assert re.search(rf"_atomic_add [^\n]*{waits}", text, re.DOTALL)


@pytest.mark.parametrize("kernel", COUNTERS)
def test_on_nvidia(tmp_path, kernel):
    """What waited forgets what its multiprocessor has in cache: the acquire is there."""
    text = assembly(gpu_target("sm_90"), kernel, tmp_path)
    assert len(re.findall(r"LDG\.E\.STRONG\.GPU .*?CCTL\.IVALL", text, re.DOTALL)) == 1
    assert text.count("CCTL.IVALL") == 1
    assert re.search(r"MEMBAR\.ALL\.GPU.*?REDG\.E\.ADD\.STRONG\.GPU", text, re.DOTALL)
