"""Options and environment: what is accepted, and what an error tells."""

from pathlib import Path

import pytest

from moec.errors import MoecError, OptionError
from moec.options import MODES, Environment, Options, check_mode


def test_defaults():
    assert Options.make() == Options.make({}) == Options.make(None) == Options()


@pytest.mark.parametrize(
    "values",
    [
        {"kernels": "cpp"},
        {"kernels": "eager", "rest": "aot_eager"},
        {"verify": False, "fuel": 3},
    ],
)
def test_values_given(values):
    made = Options.make(values)
    assert {name: getattr(made, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kernel": "cpp"}, r"unknown option 'kernel' \(did you mean 'kernels'\?\); valid options: kernels, rest, "),
        ({"zzz": 1}, "unknown option 'zzz'; valid options: kernels"),
        ({7: 1}, "unknown option 7; valid options"),
        (
            {"kernels": "ccp"},
            r"option kernels='ccp' \(did you mean 'cpp'\?\); expected one of auto, cpp, triton, eager",
        ),
        ({"rest": None}, "option rest=None; expected one of inductor, aot_eager, eager"),
        ({"rest": ["inductor"]}, r"option rest=\['inductor'\].*; expected one of inductor"),
        ({"verify": 1}, "option verify=1 is int; expected bool"),
        ({"verify": "yes"}, "option verify='yes' is str; expected bool"),
        ({"fuel": True}, "option fuel=True is bool; expected int"),
        ({"tokens": 4096}, r"option tokens=4096 is int; expected str such as '1\.\.4096'"),
        ({"fuel": 1.5}, "option fuel=1.5 is float; expected int"),
        ({"fuel": -5}, "option fuel=-5: expected a number of rewrites, or -1 for no limit"),
        (
            {"triton.cudagraphs": True},
            "unknown option 'triton.cudagraphs'.*; Inductor's own are set by torch._inductor",
        ),
        ("kernels=cpp", "options='kernels=cpp' is str; expected a dictionary of option and value"),
    ],
)
def test_errors_name_the_option_and_the_way_out(values, message):
    with pytest.raises(OptionError, match=message) as error:
        Options.make(values)
    assert isinstance(error.value, MoecError)


def test_options_are_values():
    assert hash(Options.make({"fuel": 2})) == hash(Options(fuel=2))
    with pytest.raises(AttributeError):
        Options().fuel = 3


def test_environment():
    empty = Environment.read({})
    assert empty == Environment(Path.home() / ".cache" / "moec", None, None)
    assert Environment.read({"XDG_CACHE_HOME": "/c"}).cache_dir == Path("/c/moec")
    assert Environment.read({"MOEC_CACHE_DIR": "."}).cache_dir == Path.cwd()
    given = {"MOEC_CACHE_DIR": "/m", "XDG_CACHE_HOME": "/c", "MOEC_CPU_ISA": "plain", "CXX": "clang++"}
    assert Environment.read(given) == Environment(Path("/m"), "plain", "clang++")
    assert Environment.read({"MOEC_CACHE_DIR": "", "MOEC_CPU_ISA": "", "CXX": ""}) == empty


def test_a_user_without_a_home_names_a_folder(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert Environment.read({"MOEC_CACHE_DIR": "/m"}).cache_dir == Path("/m")
    assert Environment.read({"XDG_CACHE_HOME": "/c"}).cache_dir == Path("/c/moec")
    with pytest.raises(OptionError, match=r"home directory.*set MOEC_CACHE_DIR"):
        Environment.read({})


def test_environment_is_read_when_asked(monkeypatch):
    monkeypatch.setenv("MOEC_CPU_ISA", "avx2")
    assert Environment.read().cpu_isa == "avx2"


def test_a_mode_that_torch_does_not_know():
    for mode in (None, *MODES):
        check_mode(mode)
    with pytest.raises(OptionError, match=r"mode='max-autotun' \(did you mean 'max-autotune'\?\); expected"):
        check_mode("max-autotun")


def test_a_cache_below_the_home_may_be_written_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Environment.read({"MOEC_CACHE_DIR": "~/kernels"}).cache_dir == tmp_path / "kernels"
