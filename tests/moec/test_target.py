"""Target: the instruction set is the best of the host's, or the one asked for; asking for another is an error."""

import pytest
import torch

from moec import target
from moec.errors import OptionError
from moec.target import Target, find_compiler, supported_isas


def test_supported_by_capabilities():
    avx2 = {"architecture": "x86_64", "avx2": True, "fma3": True, "f16c": True}
    avx512 = {**avx2, **{f"avx512_{x}": True for x in ("f", "bw", "vl", "dq")}}
    assert supported_isas({"architecture": "x86_64"}) == ("plain",)
    assert supported_isas(avx2) == ("avx2", "plain")
    assert supported_isas(avx512) == ("avx512", "avx2", "plain")
    assert supported_isas({**avx512, "avx512_bf16": True})[0] == "avx512_bf16"
    amx = {**avx512, "avx512_bf16": True, "amx_tile": True, "amx_bf16": True}
    assert supported_isas(amx)[:2] == ("amx_bf16", "avx512_bf16")
    assert supported_isas({**amx, "amx_bf16": False})[0] == "avx512_bf16"
    assert supported_isas({"architecture": "aarch64"}) == ("neon", "plain")


@pytest.mark.parametrize("allowed", [True, False])
def test_tiles_are_used_where_linux_lets_this_process(monkeypatch, allowed):
    names = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16", "amx_tile", "amx_bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
    monkeypatch.setattr(target, "may_use_tiles", lambda: allowed)
    host = target._host.__wrapped__(None, None)
    assert (host.isa, host.tiles) == (("amx_bf16", True) if allowed else ("avx512_bf16", False))
    if not allowed:
        with pytest.raises(OptionError, match="this host cannot run it"):
            target._host.__wrapped__("amx_bf16", None)


@pytest.mark.skipif(torch.cpu.get_capabilities().get("amx_tile", False), reason="this host has tiles")
def test_linux_refuses_tiles_that_there_are_not():
    assert not target.may_use_tiles()


def test_host_honours_the_environment(monkeypatch):
    monkeypatch.setenv("MOEC_CPU_ISA", "plain")
    assert Target.host().isa == "plain"
    assert Target.host().lanes == 4
    monkeypatch.setenv("MOEC_CPU_ISA", "sse9")
    with pytest.raises(OptionError, match=r"MOEC_CPU_ISA='sse9': it is unknown; expected one of .*plain"):
        Target.host()


def test_asking_for_what_the_host_lacks_is_an_error(monkeypatch):
    monkeypatch.setenv("MOEC_CPU_ISA", "neon" if Target.host().isa != "neon" else "avx2")
    with pytest.raises(OptionError, match="this host cannot run it"):
        Target.host()


def test_emulation_keeps_the_host_s_flags():
    host = Target.host()
    other = host.emulating("avx512_bf16")
    assert (other.isa, other.lanes, other.bf16_pairs) == ("avx512_bf16", 16, True)
    assert (other.flags, other.compiler, other.threads) == (host.flags, host.compiler, host.threads)


def test_compiler_by_name():
    assert find_compiler("/nowhere/g++") == ()
