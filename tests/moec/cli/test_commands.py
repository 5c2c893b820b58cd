"""The command line: exit codes, one-line errors, and real runs on a tiny layer."""

import importlib.metadata
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from moec.cli import commands as cli
from moec.errors import OptionError
from moec.tools.typed import demo_size, parse_options

EXAMPLES = Path(__file__).parents[3] / "examples"
TINY = """
import torch
from moec.demo.forms import make_moe
def make():
    torch.manual_seed(0)
    return make_moe(32, 16, 4, 2, torch.float32), (torch.randn(7, 32),)
def dense():
    return torch.nn.Linear(4, 4), (torch.ones(2, 4),)
def broken():
    def model(x): raise RuntimeError("broken model")
    return model, (torch.ones(1),)
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nowhere.py:make"], ["'nowhere.py' does not exist"]),
        (["explain", "plain"], ["does not name a callable"]),
        (["explain", "{tiny}:make", "--options", "kernel=cpp"], ["unknown option 'kernel'", "did you mean 'kernels'?"]),
        (["explain", "{tiny}:make", "--options", "kernels"], ["not key=value"]),
        (["explain", "{tiny}:make", "--options", "fuel=x"], ["fuel='x' is not a number"]),
        (["explain", "{tiny}:make", "--options", "fuel=1,fuel=2"], ["'fuel=2'", "fuel is 1 already"]),
        (["explain", "{tiny}:make", "--options", "kernels=triton"], ["option kernels='triton'", "TRITON_INTERPRET=1"]),
        (["inspect", "{tiny}:make", "--html", "/nonexistent/a.html"], ["does not exist"]),
        (["inspect", "{tiny}:make", "--html", "/tmp"], ["--html /tmp", "is a folder; expected the path of a file"]),
        (["inspect"], ["Missing argument 'TARGET'"]),
        (["inspect", "x:y", "--pases"], ["No such option"]),
        (["unheard"], ["No such command 'unheard'"]),
        (["demo", "--dtype", "f99"], ["--dtype 'f99'"]),
        (["demo", "--tokens", "1,x"], ["--tokens '1,x'"]),
        (["demo", "--budget", "nan"], ["--budget nan is not a positive number of seconds"]),
        (["demo", "--budget", "soon"], ["'--budget'", "(given: 'soon')"]),
        (["demo", "--hidden=wide"], ["'--hidden'", "(given: 'wide')"]),
        (["demo", "--top-k", "9", "--experts", "8"], ["--top-k 9"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny, capsys, arguments, words):
    code = cli.run([argument.format(tiny=tiny) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == cli.BAD_INPUT
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("moec: error: ")
    assert all(word in err for word in words), err


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="does not exist"):
        cli.run(["explain", "nowhere.py:make", "--debug"])


def test_options_are_typed_and_checked():
    assert parse_options(["kernels=eager, fuel=3", "verify=off"]) == {"kernels": "eager", "fuel": 3, "verify": False}
    with pytest.raises(OptionError, match="verify='maybe' is not a truth value"):
        parse_options(["verify=maybe"])


def test_demo_sizes_are_checked():
    size = demo_size("1, 8", "f32", 64, 32, 8, 2, 5.0)
    assert size.tokens == (1, 8)
    with pytest.raises(OptionError, match="--hidden 0 is too small"):
        demo_size("1", "f32", 0, 32, 8, 2, 5.0)
    with pytest.raises(OptionError, match="--budget"):
        demo_size("1", "f32", 64, 32, 8, 2, 0.0)


def test_explain_a_fused_layer(tiny, capsys):
    assert cli.run(["explain", f"{tiny}:make"]) == cli.OK
    out, _ = capsys.readouterr()
    assert "1 MoE layer found · 1 fused · 0 declined" in out


def test_explain_json_is_json_and_nothing_else(tiny, capsys):
    assert cli.run(["explain", f"{tiny}:make", "--json"]) == cli.OK
    data = json.loads(capsys.readouterr().out)
    assert data["complete"] is True
    assert [(s["status"], s["num_experts"], s["top_k"]) for s in data["sites"]] == [("fused", 4, 2)]


def test_explain_without_any_layer_keeps_no_promise(tiny, capsys):
    assert cli.run(["explain", f"{tiny}:dense"]) == cli.BROKEN_PROMISE
    assert "no MoE layer was found" in capsys.readouterr().out


def test_a_model_that_fails_is_one_line_and_bad_input(tiny, capsys):
    assert cli.run(["explain", f"{tiny}:broken"]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert "broken model" in err
    assert err.count("\n") == 1


def test_inspect_shows_ir_passes_source_and_page(tiny, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.run(["inspect", f"{tiny}:make", "--passes", "--source", "--html", str(page)]) == cli.OK
    out, err = capsys.readouterr()
    assert str(page) in err
    assert page.read_text().startswith("<!doctype html>")
    for part in ("moe @", "select topk", "raise: 0 rewrites", "@@", "#include", "1 fused"):
        assert part in out, part


def test_inspect_json_holds_diffs_and_sources(tiny, capsys):
    assert cli.run(["inspect", f"{tiny}:make", "--passes", "--source", "--json"]) == cli.OK
    data = json.loads(capsys.readouterr().out)
    assert any(step["diff"] for step in data["diffs"])
    assert list(data["sources"]) == [data["sites"][0]["spec"]]
    assert "#include" in next(iter(data["sources"].values()))


def test_inspect_with_options(tiny, capsys):
    assert cli.run(["inspect", f"{tiny}:make", "--no-ir", "--options", "kernels=eager", "--json"]) == cli.OK
    data = json.loads(capsys.readouterr().out)
    assert not any("cpp" in kernel for kernel in data["sites"][0]["kernels"])


def test_fuel_zero_declines_and_explain_says_so(tiny, capsys):
    assert cli.run(["explain", f"{tiny}:make", "--options", "fuel=0", "--json"]) == cli.BROKEN_PROMISE
    assert json.loads(capsys.readouterr().out)["complete"] is False


def test_a_layer_in_the_model_s_own_forward_has_the_model_s_class_as_name(capsys):
    assert cli.run(["explain", f"{EXAMPLES}/01_compile.py:make", "--json"]) == cli.OK
    (site,) = json.loads(capsys.readouterr().out)["sites"]
    assert site["name"] == "MoE"


def test_the_version_is_the_package_s(capsys):
    assert cli.run(["--version"]) == cli.OK
    assert capsys.readouterr().out == f"moec {importlib.metadata.version('moec')}\n"


@pytest.mark.parametrize("name", [name for panel in cli.COMMANDS.values() for name, _, _ in panel])
def test_every_command_s_help_ends_with_an_example(name, capsys):
    assert cli.run([name, "--help"]) == cli.OK
    assert f"Example: moec {name}" in capsys.readouterr().out


def test_a_group_without_a_command_shows_its_help_and_no_empty_error(capsys):
    assert cli.run(["cache"]) == cli.BAD_INPUT
    assert capsys.readouterr().err == ""


def test_stopping_is_one_line_and_exit_code_130(tiny, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moec.tools.loading.load", stop)
    assert cli.run(["explain", f"{tiny}:make"]) == 130
    assert capsys.readouterr().err == "moec: error: stopped\n"


def test_help_needs_no_torch():
    run = "from moec.cli.commands import run; r = run(['--help'])"
    code = f"import sys; {run}; assert 'torch' not in sys.modules; sys.exit(r)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "inspect", "explain", "doctor"):
        assert command in done.stdout


def test_python_m_moec_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "moec", "explain", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("moec: error: target 'x'")


WARNS = """
import sys, warnings
def make():
    for text in ("moec: first\\nsecond", "someone else's"):
        sys.stderr.write(warnings.formatwarning(text, RuntimeWarning, "place.py", 3))
    raise SystemExit(3)
"""


def test_own_warnings_are_one_line_without_their_source_and_a_target_that_exits_is_bad_input(tmp_path, capsys):
    (tmp_path / "warns.py").write_text(WARNS)
    usual = warnings.formatwarning
    assert cli.run(["explain", f"{tmp_path}/warns.py:make"]) == cli.BAD_INPUT
    own, *others, error = capsys.readouterr().err.splitlines()
    assert own == "moec: warning: first second"
    assert "place.py:3: RuntimeWarning: someone else's" in others[0]
    assert "the call without arguments failed: SystemExit: 3" in error
    assert warnings.formatwarning is usual


def test_no_grad_compiles_for_inference(tiny, capsys):
    tiny.write_text(
        TINY.replace(
            "return make_moe(32, 16, 4, 2, torch.float32),",
            "return make_moe(32, 16, 4, 2, torch.float32).requires_grad_(),",
        )
    )
    assert cli.run(["inspect", f"{tiny}:make", "--json"]) == cli.OK
    assert " training" in json.loads(capsys.readouterr().out)["sites"][0]["ir"]
    assert cli.run(["inspect", f"{tiny}:make", "--no-grad", "--json"]) == cli.OK
    assert " training" not in json.loads(capsys.readouterr().out)["sites"][0]["ir"]
