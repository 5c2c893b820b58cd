"""The hot loop is found in recorded machine code and in small control-flow graphs with one right answer each."""

from pathlib import Path

import pytest

from moec.errors import ParseError
from moec.gpu import amdgcn, sass
from moec.gpu.hot_loop import Instruction, hot_loop

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def code(*steps):
    """Instructions from words: `x` a plain one, `mma`, `->3` a branch that may be taken, `=>3` one that is, `end`."""
    made = []
    for step in steps:
        if step.startswith(("->", "=>")):
            made.append(Instruction("BRA", step, int(step[2:]), step.startswith("->")))
        else:
            made.append(Instruction(step, step, None, step != "end"))
    return made


def turn(*steps):
    made = code(*steps)
    return hot_loop(made, {i: 1.0 for i, one in enumerate(made) if one.mnemonic == "mma"})


def test_straight_code_has_no_loop():
    assert turn("x", "mma", "end") is None
    assert turn() is None


def test_loop_without_matrix_work_is_not_it():
    assert turn("x", "->0", "mma", "end") is None


def test_one_block():
    assert turn("x", "mma", "x", "->1", "end") == (1, 2, 3)


def test_innermost_of_two():
    assert turn("x", "x", "mma", "->2", "x", "->1", "end") == (2, 3)


def test_epilogue_on_a_branch_is_left_out():
    # 0 header, 1 jumps over the epilogue 2-4, 5 mma, 6 back
    assert turn("x", "->5", "x", "x", "x", "mma", "->0", "end") == (0, 1, 5, 6)


def test_way_with_more_matrix_work_wins_over_the_shorter():
    assert turn("x", "->4", "mma", "x", "mma", "->0", "end") == (0, 1, 2, 3, 4, 5)


def test_spin_behind_the_code_is_left_out():
    # 1 may wait at 5 (5 spins, 6 comes back to 2): the way that does not wait is counted.
    assert turn("x", "->5", "mma", "->0", "end", "->5", "=>2") == (0, 1, 2, 3)


def test_spin_inside_the_loop_counts_once():
    assert turn("x", "x", "->1", "mma", "->0", "end") == (0, 1, 2, 3, 4)


def test_of_two_loops_that_of_more_work():
    assert turn("mma", "->0", "mma", "mma", "->2", "end") == (2, 3, 4)


def test_recorded_sm_90_loop():
    listing = sass.parse_sass((GOLDEN / "hot_loop_sm_90.sass").read_text())
    work = {i: sass.matrix_work(one.mnemonic, (128, 128, 64))[0] for i, one in enumerate(listing)}
    loop = hot_loop(listing, {i: value for i, value in work.items() if value})
    body = [listing[i] for i in loop]
    assert len(body) == 77
    assert [sass.load_width(one) for one in body if sass.load_width(one)] == [("LDGSTS.128", 16)] * 8
    assert 8 * sum(work[i] for i in loop) == 2 * 128 * 128 * 64  # 8 warps, one iteration of the source's loop
    assert sass.shared_loads(body) == 0  # its seven LDS never take effect
    assert sass.barriers(body) == 2


def test_recorded_gfx950_loop():
    text = (GOLDEN / "hot_loop_gfx950.s").read_text()
    listing = amdgcn.parse_amdgcn(text)
    work = {i: amdgcn.matrix_work(one.mnemonic) for i, one in enumerate(listing)}
    loop = hot_loop(listing, {i: value for i, value in work.items() if value})
    body = [listing[i] for i in loop]
    assert len(body) == 90
    assert [amdgcn.load_width(one) for one in body if amdgcn.load_width(one)] == [("buffer_load_dwordx4", 16)] * 8
    assert 8 * sum(work[i] for i in loop) == 2 * 2 * 128 * 128 * 64  # two iterations: the compiler unrolled
    assert amdgcn.parse_usage(text).registers == 84
    assert amdgcn.local_traffic(listing) == (0, 0)


@pytest.mark.parametrize(
    ("mnemonic", "operations", "block"),
    [
        ("HGMMA.64x256x16.F32.BF16", 2 * 64 * 256 * 16 / 4, False),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 2 * 64 * 128 * 32 / 4, False),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16, False),
        ("HMMA.1688.F32", 2 * 16 * 8 * 8, False),
        ("IMMA.16832.S8.S8", 2 * 16 * 8 * 32, False),
        ("UTCHMMA", 2 * 128 * 256 * 16, True),
        ("UTCQMMA", 2 * 128 * 256 * 32, True),
        ("FFMA", 0, False),
        ("UTMALDG.3D", 0, False),
    ],
)
def test_sass_matrix_work(mnemonic, operations, block):
    assert sass.matrix_work(mnemonic, (256, 512, 64)) == (operations, block)


@pytest.mark.parametrize(
    ("mnemonic", "operations"),
    [
        ("v_mfma_f32_32x32x8_bf16", 2 * 32 * 32 * 8),
        ("v_mfma_f32_32x32x8_bf16_1k", 2 * 32 * 32 * 8),
        ("v_mfma_f32_4x4x4_16b_f16", 2 * 4 * 4 * 4 * 16),
        ("v_wmma_f32_16x16x16_bf16", 2 * 16 * 16 * 16),
        ("v_add_u32_e32", 0),
    ],
)
def test_amd_matrix_work(mnemonic, operations):
    assert amdgcn.matrix_work(mnemonic) == operations


@pytest.mark.parametrize(
    ("mnemonic", "load"),
    [
        ("LDG.E.128", ("LDG.128", 16)),
        ("LDG.E.U16.CONSTANT", ("LDG.U16", 2)),
        ("LDG.E.CONSTANT", ("LDG.32", 4)),
        ("LDGSTS.E.BYPASS.LTC128B.128", ("LDGSTS.128", 16)),
        ("UTMALDG.2D", ("UTMALDG", 128)),
        ("LDGDEPBAR", None),
        ("LDS.128", None),
        ("STG.E.128", None),
    ],
)
def test_sass_load_widths(mnemonic, load):
    assert sass.load_width(Instruction(mnemonic, mnemonic)) == load


@pytest.mark.parametrize(
    ("text", "load"),
    [
        ("buffer_load_dwordx4 v[2:5], v49, s[4:7], 0 offen", ("buffer_load_dwordx4", 16)),
        ("buffer_load_dwordx4 v49, s[4:7], 0 offen lds", ("buffer_load_dwordx4 lds", 16)),
        ("global_load_ushort v1, v[2:3], off", ("global_load_ushort", 2)),
        ("global_load_b128 v[1:4], v[2:3], off", ("global_load_b128", 16)),
        ("buffer_load_dword v1, off, s[0:3], 0 offset:4 ; 4-byte Folded Reload", None),
        ("ds_read_b128 v[1:4], v5", None),
    ],
)
def test_amd_load_widths(text, load):
    assert amdgcn.load_width(Instruction(text.split()[0], text)) == load


def test_branches_of_sass():
    text = """ Function : f
        /*0000*/ @P0 BRA 0x30 ;
        /*0010*/ BRA.U !UP0, 0x30 ;
        /*0020*/ BRA 0x0 ;
        /*0030*/ @!P1 EXIT ;
        /*0040*/ EXIT ;
        Function : g
        /*0000*/ NOP ;"""
    listing = sass.parse_sass(text)
    assert [(one.target, one.falls) for one in listing] == [
        (3, True),
        (3, True),
        (0, False),
        (None, True),
        (None, False),
    ]
    assert [one.mnemonic for one in sass.parse_sass(text, "g")] == ["NOP"]


def test_texts_without_a_kernel_are_refused():
    with pytest.raises(ParseError, match="no instruction"):
        sass.parse_sass("nothing")
    with pytest.raises(ParseError, match="REG"):
        sass.parse_usage("Resource usage:")
    with pytest.raises(ParseError, match="no instruction"):
        amdgcn.parse_amdgcn("; comment\n")
    with pytest.raises(ParseError, match="vgpr_count"):
        amdgcn.parse_usage(".vgpr_spill_count: 0\n.sgpr_spill_count: 0")
