"""Targets: what loads, and the one line that says why something does not."""

import sys

import pytest
import torch

from moec.errors import TargetError
from moec.tools.loading import load

GOOD = """
import torch
def make(): return torch.nn.Linear(2, 3), (torch.ones(4, 2),)
def with_kwargs(): return torch.nn.Linear(2, 3), [], {"input": torch.ones(1, 2)}
class Box:
    @staticmethod
    def make(): return make()
NUMBER = 3
def one(): return 1
def four(): return 1, 2, 3, 4
def no_model(): return 1, ()
def no_tuple(): return torch.nn.Linear(2, 3), torch.ones(1)
def no_dict(): return torch.nn.Linear(2, 3), (), 5
def fails(): raise ValueError("no\\nweights")
def needs(x): return x
def leaves(): raise SystemExit("no weights")
def fails_in_torch(): return torch.nn.Flatten(0)(torch.ones(3).unflatten(0, (1, 3)).unsqueeze(0).reshape(7))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "good_target.py").write_text(GOOD)
    (tmp_path / "bad_target.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "torn_target.py").write_text("def make(:\n")
    (tmp_path / "exits_target.py").write_text("import sys\nsys.exit(4)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n.endswith("_target")]:
        sys.modules.pop(name)


@pytest.mark.parametrize("target", ["good_target.py:make", "good_target:make", "good_target.py:Box.make"])
def test_loads_from_file_and_module(folder, target):
    loaded = load(target)
    assert isinstance(loaded.model, torch.nn.Linear)
    assert loaded.args[0].shape == (4, 2)
    assert loaded.kwargs == {}


def test_absolute_path_and_kwargs(folder):
    loaded = load(f"{folder / 'good_target.py'}:with_kwargs")
    assert loaded.args == ()
    assert list(loaded.kwargs) == ["input"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("good_target.py", ["does not name a callable", "module:callable or file.py:callable"]),
        (":make", ["does not name a callable"]),
        ("absent.py:make", ["'absent.py' does not exist"]),
        ("absent_module:make", ["no module 'absent_module'"]),
        ("good_target.py:mak", ["'mak' is not defined", "did you mean 'make'?"]),
        ("good_target.py:zzz", ["'zzz' is not defined", "it has: "]),
        ("good_target.py:NUMBER", ["is int, not a callable"]),
        ("good_target.py:one", ["returned int", "expected (model, args)"]),
        ("good_target.py:four", ["returned a tuple of 4"]),
        ("good_target.py:no_model", ["the model is int"]),
        ("good_target.py:no_tuple", ["args is Tensor", "(x,)"]),
        ("good_target.py:no_dict", ["kwargs is int"]),
        ("good_target.py:fails", ["ValueError: no weights", "good_target.py:"]),
        ("good_target.py:needs", ["the call without arguments failed", "'x'"]),
        ("bad_target.py:make", ["fails on import", "nothing_of_that_name", "bad_target.py:1"]),
        ("bad_target:make", ["fails on import", "nothing_of_that_name"]),
        ("torn_target.py:make", ["fails on import: SyntaxError: invalid syntax (torn_target.py, line 1)"]),
        ("exits_target.py:make", ["fails on import: SystemExit: 4", "exits_target.py:2"]),
        ("exits_target:make", ["fails on import: SystemExit: 4", "exits_target.py:2"]),
        ("good_target.py:leaves", ["the call without arguments failed: SystemExit: no weights", "good_target.py:"]),
        ("good_target.py:fails_in_torch", ["RuntimeError: shape '[7]' is invalid", "good_target.py:"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, target, words):
    with pytest.raises(TargetError) as caught:
        load(target)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_module_named_like_a_file_gets_a_hint(folder):
    (folder / "pkg").mkdir()
    with pytest.raises(TargetError, match="did you mean the file"):
        load("pkg/../good_target:make")
