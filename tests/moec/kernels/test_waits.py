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

# A look that is followed by forgetting what is in caches; that a wave's stores have arrived before the barrier; that
# all has left the caches which others do not see before the unit is counted. gfx942 has several second caches.
CDNA3 = (
    r"sc[01]\n\s*s_waitcnt vmcnt\(0\)\n\s*buffer_inv sc1",
    r"(?:vmcnt\(0\)\n(?:(?!s_barrier|_store_).)*?offset:24\n|offset:24\n(?:(?!s_barrier).)*?vmcnt\(0\)\n).*?s_barrier\n",
    r"buffer_wbl2 sc1\n\s*s_waitcnt vmcnt\(0\)\n",
)
AMD = {
    "gfx942": CDNA3,
    "gfx950": CDNA3,
    "gfx90a": (
        r"glc\n\s*s_waitcnt vmcnt\(0\)\n\s*buffer_wbinvl1_vol",
        r"s_waitcnt vmcnt\(0\)[^\n]*\n\s*global_atomic_add [^\n]*offset:24\n.*?s_barrier\n",
        r"s_waitcnt vmcnt\(0\)\n",
    ),
    "gfx1100": (
        r"glc\n\s*s_waitcnt vmcnt\(0\)\n\s*buffer_gl1_inv\n\s*buffer_gl0_inv",
        r"_atomic_add_u32 [^\n]*offset:24\n.*?s_waitcnt_vscnt null, 0x0\n\s*s_barrier\n",
        r"s_waitcnt_vscnt null, 0x0\n",
    ),
    "gfx1201": (
        r"scope:SCOPE_DEV\n\s*s_wait_loadcnt 0x0\n\s*global_inv scope:SCOPE_DEV",
        r"_atomic_add_u32 [^\n]*offset:24\n.*?s_wait_storecnt 0x0\n.*?s_barrier_wait",
        r"s_wait_storecnt 0x0\n",
    ),
}


def others_slow(names, quick):
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def assembly(target, name, folder):
    found = next(each for each in kernel_jobs(Request(SPEC, SIZES, target)) if each.launch.kernel == name)
    made = compile_offline(found.job, target, folder, 600)
    assert isinstance(made, Compiled), made
    return re.sub(r"\n\s*\.(loc|Ltmp)[^\n]*", "", made.assembly)


@pytest.mark.parametrize("kernel", COUNTERS)
@pytest.mark.parametrize("target", others_slow(AMD, "gfx942"))
def test_on_amd(tmp_path, target, kernel):
    """A plain load, volatile or not, is read once before the loop; a barrier does not wait for stores of other waves,
    nor does a release; with no other store under way a release does not wait for the caches that it writes back."""
    text, at = assembly(gpu_target(target), kernel, tmp_path), COUNTERS[kernel]
    forgotten, arrived, left = AMD[target]
    look = rf"global_(?:load_(?:dword|b32)|atomic_or) [^\n]*offset:{at} {forgotten}"
    assert len(re.findall(rf"Inner Loop Header(?:(?!Loop Header|s_endpgm).)*?{look}", text, re.DOTALL)) == 1
    assert re.search(rf"{arrived}.*?{left}\s*global_atomic_add[^\n]*offset:{at}", text, re.DOTALL)


@pytest.mark.parametrize("kernel", COUNTERS)
@pytest.mark.parametrize("target", others_slow(("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"), "sm_90"))
def test_on_nvidia(tmp_path, target, kernel):
    """What waited forgets what its multiprocessor has in cache: the acquire is there."""
    text = assembly(gpu_target(target), kernel, tmp_path)
    assert len(re.findall(r"LDG\.E\.STRONG\.GPU .*?CCTL\.IVALL", text, re.DOTALL)) == 1
    assert text.count("CCTL.IVALL") == 1
    assert re.search(r"MEMBAR\.ALL\.GPU.*?REDG?\.E\.ADD\.STRONG\.GPU", text, re.DOTALL)
