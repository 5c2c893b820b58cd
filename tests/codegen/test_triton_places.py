"""Where a call's buffers lie in their one block: at the same place where no launch needs both."""

import dataclasses
import itertools

import pytest

from moec.codegen.plan import Sizes
from moec.codegen.triton_backward import Wanted, backward_config, backward_program
from moec.codegen.triton_call import places
from moec.codegen.triton_config import default_config
from moec.codegen.triton_launch import ALIGNED, program
from moec.codegen.triton_operands import contiguous
from moec.gpu.target import gpu_target
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec

SPEC = KernelSpec(ExpertsSpec("bf16"), None, "bf16")
MIXTRAL = Sizes(4096, 4096, 14336, 8, 2)


def backward(saved, x=True, sizes=MIXTRAL):
    config = backward_config(default_config(SPEC, sizes, gpu_target("sm_90")))
    wanted = Wanted(x, True, SPEC.experts.param_groups, saved)
    return backward_program(SPEC, sizes, config, contiguous(SPEC, sizes), wanted)


def spans(made):
    """(first byte, byte behind the last, launches that use it) of each buffer."""
    begins, _ = places(made, ALIGNED)
    users = [{i for i, launch in enumerate(made.launches) if b.name in launch.pointers} for b in made.buffers]
    return [(at, at + b.bytes, used) for at, b, used in zip(begins, made.buffers, users, strict=True)]


@pytest.mark.parametrize("made", [
    backward(True), backward(False), backward(True, x=False), backward(False, sizes=Sizes(7, 40, 24, 3, 2)),
    program(SPEC, MIXTRAL, default_config(SPEC, MIXTRAL)),
    program(KernelSpec(SPEC.experts, RouterSpec(), "bf16"), MIXTRAL, default_config(SPEC, MIXTRAL)),
])  # fmt: skip
def test_what_is_needed_at_the_same_time_lies_apart(made):
    begins, end = places(made, ALIGNED)
    for (a, b, used), (c, d, others) in itertools.combinations(spans(made), 2):
        apart = b <= c or d <= a
        one_after_the_other = not used or not others or max(used) < min(others) or max(others) < min(used)
        assert apart or one_after_the_other
    assert all(begin % ALIGNED == 0 for begin in begins)
    assert end >= max(b for _, b, _ in spans(made))


def test_rows_of_a_backward_call_take_each_other_s_place():
    """Of y's gradient, of x and of dx, [T·k, H] each: one place where forward kept φ's inputs, else two."""
    rows = 4096 * 2 * 4096 * 2
    for saved, kept in ((True, 1), (False, 2)):
        made = backward(saved)
        total = sum(b.bytes for b in made.buffers)
        assert places(made, ALIGNED)[1] <= total - (3 - kept) * rows + 16 * ALIGNED


def test_zeros_are_kept_from_the_first_launch_on():
    config = default_config(SPEC, MIXTRAL, gpu_target("sm_90"))
    made = program(SPEC, MIXTRAL, dataclasses.replace(config, combine="atomic"))
    begins, _ = places(made, ALIGNED)
    (zeros,) = [(at, at + b.bytes) for at, b in zip(begins, made.buffers, strict=True) if b.zeros]
    others = [(at, at + b.bytes) for at, b in zip(begins, made.buffers, strict=True) if not b.zeros]
    assert all(end <= zeros[0] or zeros[1] <= begin for begin, end in others)
