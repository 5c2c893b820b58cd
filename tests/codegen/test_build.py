"""The builder: cache, damage, errors, one pool of OpenMP threads, other instruction sets."""

import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moec.codegen import cpp
from moec.codegen.build import build
from moec.errors import BuildError
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.target import Target

TINY = 'extern "C" __attribute__((visibility("default"))) int seven() { return 7; }\n'
LOADS = """
import os, sys
from pathlib import Path
from moec.codegen.build import build
from moec.target import Target
for folder in sys.argv[2:]:
    child = os.fork()  # what is loaded without some of its bytes may end the process
    if child == 0:
        print(Path(folder).name, build(sys.argv[1], Target.host(), Path(folder)).seven(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
SPEC = KernelSpec(ExpertsSpec("bf16"), RouterSpec("bf16"), y_dtype="bf16")


def test_second_build_is_a_cache_hit(tmp_path):
    target = Target.host()
    assert build(TINY, target, tmp_path).seven() == 7
    (built,) = tmp_path.glob("*.so")
    stamp = built.stat().st_mtime_ns
    without_compiler = replace(target, flags=target.flags)
    assert build(TINY, without_compiler, tmp_path).seven() == 7
    assert built.stat().st_mtime_ns == stamp
    build(TINY + "// another\n", target, tmp_path)
    assert len(list(tmp_path.glob("*.so"))) == 2


def test_a_damaged_entry_is_built_again(tmp_path):
    build(TINY, Target.host(), tmp_path / "good")
    (good,) = (tmp_path / "good").glob("*.so")
    bad = tmp_path / "bad" / good.name
    bad.parent.mkdir()
    bad.write_bytes(good.read_bytes()[:100])
    assert build(TINY, Target.host(), bad.parent).seven() == 7
    assert bad.stat().st_size == good.stat().st_size


def test_libraries_that_lack_bytes_are_not_loaded(tmp_path):
    build(TINY, Target.host(), tmp_path / "good")
    (good,) = (tmp_path / "good").glob("*.so")
    content, folders = good.read_bytes(), []
    for kept in (0, 1, 64, 0.2, 0.5, 0.9, 0.999):
        count = kept if isinstance(kept, int) else int(kept * len(content))
        for rest in (0, len(content) - count):  # missing, and zeros
            folder = tmp_path / f"{kept}+{rest}"
            folder.mkdir()
            (folder / good.name).write_bytes(content[:count] + bytes(rest))
            folders.append(folder)
    command = [sys.executable, "-c", LOADS, TINY, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{folder.name} 7" for folder in folders], done.stderr
    assert all((folder / good.name).read_bytes() == content for folder in folders)


def test_a_compiler_that_is_not_there_is_named(tmp_path, monkeypatch):
    for wanted in ("nosuch++", "nosuchcache g++", "g++ 'open"):
        monkeypatch.setenv("CXX", wanted)
        with pytest.raises(BuildError, match=re.escape(f"CXX={wanted!r} names no program on the path")):
            build(TINY, Target.host(), tmp_path)


def test_a_compiler_may_have_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "env UNUSED='a b' g++")
    target = Target.host()
    assert target.compiler == (shutil.which("env"), "UNUSED=a b", "g++")
    assert build(TINY, target, tmp_path).seven() == 7


FAILS = """#!/bin/sh
[ "$1" = --version ] && echo broken++ 1.0 && exit
for source; do case "$source" in *.cpp) echo "$source:1:1: error: no headers" >&2 ;; esac; done
exit 1
"""


def test_the_same_failure_is_the_same_reason_for_every_kernel(tmp_path):
    compiler = tmp_path / "broken++"
    compiler.write_text(FAILS)
    compiler.chmod(0o755)
    target = replace(Target.host(), compiler=(str(compiler),))
    reasons = set()
    for source in (TINY, f"{TINY}// another"):
        with pytest.raises(
            BuildError, match=r"^kernel\.cpp:1:1: error: no headers: the C\+\+ compiler failed"
        ) as caught:
            build(source, target, tmp_path / "cache")
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "\n" not in reasons.pop()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_a_compiler_that_fails_for_a_full_disk_runs_in_the_temporary_folder(tmp_path, monkeypatch):
    wrapper = tmp_path / "full++"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *{tmp_path}/cache*) exit 1 ;; esac\nexec g++ "$@"\n')
    wrapper.chmod(0o755)
    write = Path.write_bytes

    def full(path, content):
        if path.is_relative_to(tmp_path / "cache"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(RuntimeWarning, match="kernels are not kept: .*No space left"):
        assert build(TINY, replace(Target.host(), compiler=(str(wrapper),)), tmp_path / "cache").seven() == 7


def test_a_library_is_loaded_by_a_copy_where_programs_may_not_run_from_the_cache(tmp_path, monkeypatch):
    load = ctypes.CDLL

    def refused(name):
        if name.startswith(str(tmp_path)):
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", refused)
    assert build(TINY, Target.host(), tmp_path).seven() == 7
    (built,) = tmp_path.glob("*.so")
    stamp = built.stat().st_mtime_ns
    assert build(TINY, Target.host(), tmp_path).seven() == 7
    assert built.stat().st_mtime_ns == stamp


def test_what_a_killed_build_left_is_cleared_away(tmp_path):
    build(TINY, Target.host(), tmp_path)
    (built,) = tmp_path.glob("*.so")
    left = built.with_suffix(".new")
    left.mkdir()
    (left / "kernel.so").write_text("half")
    built.unlink()
    assert build(TINY, Target.host(), tmp_path).seven() == 7
    assert not left.exists()


def test_a_compiler_that_writes_nothing_is_named(tmp_path):
    with pytest.raises(BuildError, match=r"true .*wrote no library; set CXX"):
        build(TINY, replace(Target.host(), compiler=(shutil.which("true"),)), tmp_path)


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    with pytest.warns(
        RuntimeWarning, match="kernels are not kept: the cache folder .*file cannot be written .*MOEC_CACHE"
    ):
        assert build(TINY, Target.host(), folder).seven() == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(TINY, Target.host(), folder).seven() == 7  # once is enough
    with pytest.warns(RuntimeWarning, match="kernels are not kept"):
        assert build(TINY, Target.host(), Path("/dev/null/cache")).seven() == 7


def test_where_nothing_can_be_written_the_error_names_both_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.warns(RuntimeWarning), pytest.raises(BuildError, match=r"neither .* nor the system's temporary folder"):
        build(TINY, Target.host(), Path("/dev/null/cache2"))


def test_errors_name_the_command_and_the_first_errors(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"^kernel\.cpp:1:1: error: .*nonsense.*-shared"):
        build("nonsense nonsense;\n", Target.host(), tmp_path)
    assert not list(tmp_path.glob("*.so"))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler found"):
        build(TINY, replace(Target.host(), compiler=()), tmp_path)
    with pytest.raises(BuildError, match="cannot be run"):
        build(TINY, replace(Target.host(), compiler=("/nowhere/g++",)), tmp_path)


def test_one_pool_of_openmp_threads(tmp_path):
    torch.mm(torch.randn(300, 300), torch.randn(300, 300))
    build(cpp.emit(replace(SPEC, router=None), Target.host()), Target.host(), tmp_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps on this system")
    pools = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line or "libomp" in line}
    assert len(pools) == 1


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the host is not x86-64")
def test_avx512_bf16_compiles_to_pair_products_in_registers(tmp_path):
    """Built for the real instruction set, and only looked at: 12x2 sums stay in registers."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    target = replace(Target.host().emulating("avx512_bf16"), flags=_flags("avx512_bf16"), tile_rows=12)
    build(cpp.emit(replace(SPEC, router=None), target), target, tmp_path)
    (built,) = tmp_path.glob("*.so")
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", built], capture_output=True, text=True).stdout
    assert longest_run_without_spills(listing) >= 24


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the host is not x86-64")
def test_amx_compiles_to_products_of_tiles(tmp_path):
    """Built for the real instructions, and only looked at: four products a step, nothing of its loop on the stack."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    target = replace(Target.host().emulating("amx_bf16"), flags=_flags("amx_bf16"), tile_rows=12, dot_rows=6)
    build(cpp.emit(replace(SPEC, router=None), target), target, tmp_path)
    (built,) = tmp_path.glob("*.so")
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", built], capture_output=True, text=True).stdout
    kernels = [text for text in listing.split("\n\n") if "micro_tiles" in text.partition("\n")[0]]
    assert kernels
    for kernel in kernels:
        lines = kernel.splitlines()
        products = [i for i, line in enumerate(lines) if "tdpbf16ps" in line]
        assert len(products) in (2, 4), "rows of one group or of two, against two of columns"
        step = lines[products[0] - 4 : products[-1] + 1]
        assert not [line for line in step if "rsp" in line or "rbp)" in line], "operands of a step are in registers"
    assert listing.count("ldtilecfg") == listing.count("tilerelease") >= 1


def _flags(isa):
    from moec.target import _ISAS

    return _ISAS[isa].flags


def longest_run_without_spills(listing):
    """The most pair products between two instructions that touch the stack or jump."""
    best = run = 0
    for line in listing.splitlines():
        if "vdpbf16ps" in line and "rsp" not in line:
            run += 1
            best = max(best, run)
        elif "rsp" in line or "\tj" in line or "ret" in line:
            run = 0
    return best


def test_neon_compiles(tmp_path):
    cross = shutil.which("aarch64-linux-gnu-g++")
    compiler = (cross,) if cross else Target.host().compiler if os.uname().machine == "aarch64" else ()
    if not compiler:
        pytest.skip("no compiler for aarch64 on this machine")
    target = replace(Target.host().emulating("neon"), flags=_flags("neon"), compiler=compiler)
    source = tmp_path / "kernel.cpp"
    source.write_text(cpp.emit(SPEC, target, "bf16"))
    headers = Path(cpp.__file__).resolve().parent
    command = [*compiler, "-O2", "-std=c++17", "-fopenmp", *target.flags, f"-I{headers}", "-c", source]
    done = subprocess.run([*command, "-o", tmp_path / "kernel.o"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_older_kernel_would_be_noticed():
    """Every kernel says how many words it takes, and there are exactly as many in a plan and a call."""
    from moec.runtime.cpu import load_kernel

    kernel = load_kernel(str(KernelSpec(ExpertsSpec())), None)
    assert isinstance(kernel.library, ctypes.CDLL)
    kernel._words -= 1
    with pytest.raises(AssertionError, match="words"):
        kernel.experts(
            torch.randn(1, 4), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64),
            [torch.randn(1, 4, 4), torch.randn(1, 4, 2)],
        )  # fmt: skip
    kernel._words += 1
