"""`moec verify`: the long proof of a user's model, and its exit code."""

from __future__ import annotations

import json

import pytest

from moec.cli import commands as cli

SOURCE = """
import torch
import torch.nn.functional as F

class MoE(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = torch.nn.Linear(8, 4, bias=False)
        self.up, self.down = (torch.nn.Parameter(torch.randn(4, *s) * 0.3) for s in ((12, 8), (8, 12)))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        w, e = torch.topk(F.softmax(self.gate(x), -1), 2, -1)
        h = torch.einsum("th,tkfh->tkf", x, self.up[e]).relu()
        return torch.einsum("tk,tkh->th", w, torch.einsum("tkf,tkhf->tkh", h, self.down[e]))

MODEL = MoE()

def make():
    return MODEL, (torch.randn(9, 8),)

def dense():
    return torch.nn.Linear(8, 8), (torch.randn(9, 8),)
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "verified.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return "verified.py:make"


@pytest.mark.parametrize("grad", [True, False])
def test_a_right_model(target, capsys, grad):
    arguments = ["verify", target, "--json", "--options", "kernels=eager"]
    assert cli.run(arguments if grad else [*arguments, "--no-grad"]) == 0
    found = json.loads(capsys.readouterr().out)
    (site,) = found["rewrites"]
    assert (found["holds"], site["status"], found["whole"]["equal"]) == (True, "agrees", True)
    assert {"random", "one expert", "ties"} == set(site["seen"]["routings"])
    assert site["seen"]["trials"] >= 30
    assert site["seen"]["exact"] < 1e-10
    assert (site["seen"]["gradients"] is not None) == grad
    assert site["seen"]["agreement"] == (None if grad else 1.0)


def test_the_table(target, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.run(["verify", target, "--no-grad", "--options", "kernels=eager"]) == 0
    out = capsys.readouterr().out
    for words in ("agrees", "same experts", "100.00 %", "one expert", "whole model against eager"):
        assert words in out, out


def test_a_wrong_kernel_is_found(target, capsys, monkeypatch):
    from moec.codegen import twin

    route = twin.route
    monkeypatch.setattr(twin, "route", lambda *a: (lambda z, w, e: (z, w * 1.01, e))(*route(*a)))
    with pytest.warns(RuntimeWarning, match="computes something else"):
        assert cli.run(["verify", target, "--no-grad", "--json", "--options", "kernels=eager"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["rewrites"][0]["status"] == "differs"
    assert "routing 'random'" in found["rewrites"][0]["seen"]["wrong"][0]


def test_nothing_to_verify(target, capsys):
    assert cli.run(["verify", "verified.py:dense"]) == 1
    assert "no MoE layer was fused" in capsys.readouterr().out
