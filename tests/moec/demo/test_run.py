"""The demo's parts: three forms of one layer agree, weights are distinct, and a wrong result is seen."""

import json

import pytest
import torch
from rich.console import Console

from moec.demo import check as demo_check
from moec.demo import run as demo
from moec.demo.forms import GatheredExperts, GroupedExperts, make_moe, with_experts
from moec.demo.run import run_demo
from moec.demo.view import show_demo
from moec.tools.typed import demo_size


@pytest.mark.parametrize("tokens", [1, 7, 200])
@pytest.mark.parametrize("form", [GroupedExperts, GatheredExperts])
def test_forms_agree_and_share_parameters(form, tokens):
    torch.manual_seed(0)
    layer = make_moe(32, 16, 8, 2, torch.float32)
    other = with_experts(layer, form)
    x = torch.randn(tokens, 32)
    torch.testing.assert_close(other(x), layer(x), rtol=1e-5, atol=1e-6)
    assert other.experts.down is layer.experts.down


def test_experts_have_weights_of_their_own():
    torch.manual_seed(0)
    experts = make_moe(64, 48, 8, 2, torch.float32).experts
    assert len({tuple(e.flatten()[:8].tolist()) for e in experts.gate_up}) == 8
    assert experts.gate_up.std() == pytest.approx(0.02, rel=0.05)


def test_check_sees_a_wrong_result_and_a_wrong_choice(monkeypatch):
    torch.manual_seed(0)
    layer, x = make_moe(32, 16, 8, 2, torch.float32), torch.randn(7, 32)
    right = demo_check.showing_choice(layer)

    def result(change):
        monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda x: change(*right(x)))
        return demo_check.check(layer, {7: x}, lambda tokens: True)[0]

    assert result(lambda y, chosen: (y, chosen)).equal
    assert not result(lambda y, chosen: (y * 1.01, chosen)).equal
    assert not result(lambda y, chosen: (y, (chosen + 1) % 8)).equal
    assert result(lambda y, chosen: (y * float("nan"), chosen)).error == float("inf")


def test_demo_end_to_end(capsys, monkeypatch):
    monkeypatch.setattr(demo, "ALTERNATIVES", demo.ALTERNATIVES[:1])  # test_readme runs all, by the documented command
    result = run_demo(demo_size("1,7", "f32", 64, 32, 8, 2, 4.0), Console(stderr=True))
    assert result.equal, result.checked
    data = json.loads(result.to_json())
    assert [row["tokens"] for row in data["rows"]] == [1, 7]
    assert all("moec" in row["times"] for row in data["rows"])
    show_demo(result, Console(width=120))
    out = capsys.readouterr().out
    for part in ("Is it right?", "How fast?", "limit of this machine", "1 fused"):
        assert part in out
