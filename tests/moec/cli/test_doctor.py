"""doctor: every check answers, and broken things are named with a way out."""

import json
from array import array

import pytest

from moec.cli import commands as cli
from moec.doctor import machine as doctor
from moec.runtime.nodes import Nodes


def test_every_check_says_what_was_found_and_the_way_out(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", tuple(c for c in doctor.CHECKS if c is not doctor._kernel))
    results = doctor.checks()
    assert [c.name for c in results][:4] == ["python", "torch", "triton", "compiler"]
    assert all(c.found and c.way_out and c.status in doctor.STYLES for c in results)


def test_a_cache_that_cannot_be_written_costs_time_and_breaks_nothing(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("MOEC_CACHE_DIR", str(file / "below"))
    check = doctor._cache()
    assert check.status == "note"
    assert "built anew in every process" in check.found
    assert "MOEC_CACHE_DIR" in check.way_out


def test_threads_of_several_memory_nodes(monkeypatch):
    monkeypatch.setattr(doctor, "nodes", lambda: Nodes(2, array("i", [0, 1]), (0, 1)))
    check = doctor._threads()
    assert "2 memory nodes" in check.found
    assert "OMP_PROC_BIND" in check.way_out


def test_a_missing_compiler_is_broken(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check = doctor._compiler()
    assert check.status == "broken"
    assert "no-such-compiler" in check.found


def test_an_instruction_set_that_the_host_lacks_is_broken(monkeypatch):
    monkeypatch.setenv("MOEC_CPU_ISA", "quantum")
    monkeypatch.setattr(doctor, "CHECKS", (doctor._isa,))
    assert [c.status for c in doctor.checks()] == ["broken"]
    assert "quantum" in doctor.checks()[0].found


@pytest.mark.parametrize("probe", ["import sys; sys.exit('a\\nRuntimeError: boom\\nadvice')", "import os; os.abort()"])
def test_a_probe_that_dies_is_an_answer(monkeypatch, probe):
    monkeypatch.setattr(doctor, "PROBE", probe)
    check = doctor._kernel()
    assert check.status == "broken"
    assert "boom" in check.found or "exit code -6" in check.found


def test_a_check_that_cannot_be_made_is_an_answer_too(monkeypatch):
    def no_folder():
        raise FileNotFoundError("no usable temporary folder")

    monkeypatch.setattr(doctor, "CHECKS", (doctor._kernel, doctor._python))
    monkeypatch.setattr(doctor, "PROBE", "pass")  # ends well and says nothing
    assert [c.status for c in doctor.checks()] == ["broken", "ok"]
    monkeypatch.setattr(doctor.tempfile, "TemporaryDirectory", no_folder)
    broken, _ = doctor.checks()
    assert (broken.name, broken.status) == ("kernel", "broken")
    assert "no usable temporary folder" in broken.found


def test_doctor_runs_a_real_kernel_here(capsys):
    code = cli.run(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    kernel = next(c for c in data["checks"] if c["name"] == "kernel")
    assert kernel["status"] == "ok", kernel
    assert (code == 0) == data["ok"]
