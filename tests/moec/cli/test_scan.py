"""scan: what would be fused, from source alone; nothing has data."""

import json
import sys

import pytest
import torch

from moec.cli import commands as cli
from moec.tools.scan import parse_input

SOURCE = """
import torch, torch.nn.functional as F
from torch import nn

class Config:
    def __init__(self, width=32, experts=4): self.width, self.experts = width, experts

class Experts(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(config.experts, 16, config.width))
        self.down = nn.Parameter(torch.zeros(config.experts, config.width, 16))
    def forward(self, x, weights, chosen):
        rows = torch.einsum("th,tkfh->tkf", x, self.up[chosen]).relu()
        return torch.einsum("tk,tkh->th", weights, torch.einsum("tkf,tkhf->tkh", rows, self.down[chosen]))

class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate, self.experts = nn.Linear(config.width, config.experts), Experts(config)
    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        return self.experts(flat, weights, chosen).view_as(x)

class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(3))
    def forward(self, x):
        for layer in self.layers: x = x + layer(x)
        return x

class Sized(nn.Module):
    def __init__(self, hidden, experts):
        super().__init__()
        self.inner = Layer(Config(hidden, experts))
    def forward(self, x): return self.inner(x)

class Dense(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 5)
    def forward(self, x): return self.up(x)

def make():
    return Model(Config(64, 8)), (torch.randn(2, 3, 64),)
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    path = tmp_path / "scanned_model.py"
    path.write_text(SOURCE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield path
    for name in [n for n in sys.modules if "scanned_model" in n]:
        del sys.modules[name]


def scan(capsys, *arguments):
    code = cli.run(["scan", *arguments, "--json"])
    return code, {each["name"]: each for each in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("place", ["{}", "scanned_model"])
def test_every_class_of_a_file_or_module_is_scanned(source, capsys, place):
    code, found = scan(capsys, place.format(source))
    assert code == cli.OK
    (site,) = found["Layer"]["report"]["sites"]
    assert (site["status"], site["num_experts"], site["top_k"]) == ("fused", 4, 2)
    assert found["Model"]["holds"] == ["Layer"]
    assert found["Sized"]["holds"] == ["Layer"]
    assert found["Dense"]["report"]["sites"] == []
    assert found["Experts"]["report"] is None
    assert "--input" in found["Experts"]["why"]


def test_a_package_is_scanned_with_its_modules(source, tmp_path, capsys):
    package = tmp_path / "scanned_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text(SOURCE)
    code, found = scan(capsys, str(package))
    assert code == cli.OK
    assert found["Layer"]["report"]["sites"][0]["status"] == "fused"


def test_a_factory_is_called_without_data(source, capsys):
    code, found = scan(capsys, f"{source}:make")
    assert code == cli.OK
    (one,) = found.values()
    assert [s["status"] for s in one["report"]["sites"]] == ["fused"] * 3
    assert one["inputs"] == "f32[2, 3, 64]"


def test_arguments_and_inputs_can_be_given(source, capsys):
    code, found = scan(capsys, f"{source}:Sized", "--args", "hidden=48,experts=6", "--input", "f32[5, 48]")
    assert code == cli.OK
    assert found["Sized"]["inputs"] == "f32[5, 48]"
    assert found["Sized"]["report"]["sites"][0]["num_experts"] == 6


def test_an_input_that_does_not_fit_is_the_model_s_own_error(source, capsys):
    code, found = scan(capsys, f"{source}:Dense", "--args", "width=8", "--input", "f32[2, 9]")
    assert code == cli.BROKEN_PROMISE
    assert found["Dense"]["why"].startswith("RuntimeError: ")
    assert "[2, 9]" in found["Dense"]["why"]


def test_what_holds_no_layer_keeps_no_promise(source, capsys):
    assert cli.run(["scan", f"{source}:Dense"]) == cli.BROKEN_PROMISE
    assert "no MoE layer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing_of_that_name"], ["no module 'nothing_of_that_name'"]),
        (["absent.py"], ["does not exist"]),
        (["."], ["has no __init__.py"]),
        (["json"], ["defines no module class"]),
        (["{}:Sized", "--input", "5x48"], ["--input '5x48' is not a tensor"]),
        (["{}:Sized", "--args", "48"], ["--args '48' is not name=value"]),
        (["{}:Missing"], ["'Missing' is not defined"]),
    ],
)
def test_bad_input_is_one_line(source, capsys, arguments, words):
    assert cli.run(["scan", *(a.format(source) for a in arguments)]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_inputs_have_no_data():
    t = parse_input("bf16[2, 7, 64]")
    assert (t.device.type, t.dtype, t.shape) == ("meta", torch.bfloat16, (2, 7, 64))
