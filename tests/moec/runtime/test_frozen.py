"""options freeze and weights: copies are made in inference only, follow their parameters, and are in the report."""

import json
import warnings

import pytest
import torch

import moec
from moec.demo.forms import make_moe
from moec.errors import OptionError
from moec.options import Options
from moec.runtime import ops as runtime
from moec.runtime.copies import copies_made
from moec.target import Target

LIMITS = {"packed": 1e-5, "bf16": 1e-2, "int8": 3e-2, "int8:16": 2e-2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    torch._dynamo.reset()
    return make_moe(32, 48, 4, 2, torch.float32)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("weights", LIMITS)
def test_results_in_inference(model, weights):
    with torch.no_grad(), copies_made() as copies:
        compiled = torch.compile(model, backend="moec", options={"weights": weights, "rest": "eager"})
        for T in (1, 5, 40):
            x = torch.randn(T, 32)
            assert relative(compiled(x), model(x)) < LIMITS[weights]
    assert len(copies) == 1


def test_a_changed_parameter_is_copied_again(model):
    x = torch.randn(9, 32)
    with torch.no_grad(), copies_made() as copies:
        compiled = torch.compile(model, backend="moec", options={"freeze": True, "rest": "eager"})
        assert relative(compiled(x), model(x)) < 1e-5
        for p in model.parameters():
            p.mul_(1.5)
        assert relative(compiled(x), model(x)) < 1e-5
        model.load_state_dict({name: p * 0.5 for name, p in model.state_dict().items()})
        assert relative(compiled(x), model(x)) < 1e-5
        assert relative(compiled(x), model(x)) < 1e-5
    assert len(copies) == 3


def test_training_reads_the_weights_as_stored(model):
    model.requires_grad_(True)
    report = moec.explain(model, torch.randn(9, 32), moec_options={"weights": "int8", "rest": "eager"})
    assert report.packed == []
    assert "for inference: this graph is trained" in str(report)


def test_the_report_says_bytes_time_and_error(model):
    with torch.no_grad():
        report = moec.explain(model, torch.randn(9, 32), moec_options={"weights": "int8", "rest": "eager"})
    (record,) = report.packed
    assert report.sites[0].kernels == (f"moe_f32_{Target.host().isa}_int8",)
    assert record.weights == "int8"
    assert record.packed_bytes < 0.4 * record.stored_bytes
    assert 1e-4 < record.error < 2e-2
    assert f"relative error {record.error:.2g}" in str(report)
    assert json.loads(report.to_json())["packed"][0]["packed_bytes"] == record.packed_bytes


def test_a_copy_that_cpu_kernels_have_not_is_told_by_a_warning_and_by_no_kernel_s_name(model):
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="weights='fp8': no C\\+\\+ kernel stores them so"):
        report = moec.explain(model, torch.randn(9, 32), moec_options={"weights": "fp8", "rest": "eager"})
    assert report.packed == []
    assert report.sites[0].kernels == (f"moe_f32_{Target.host().isa}",)


def test_two_layers_have_two_copies():
    torch.manual_seed(0)
    model = torch.nn.Sequential(make_moe(32, 48, 4, 2, torch.float32), make_moe(32, 48, 4, 2, torch.float32))
    x = torch.randn(9, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="moec", options={"freeze": True, "rest": "eager"})
        for _ in range(3):
            assert relative(compiled(x), model(x)) < 1e-5


def test_parameters_without_versions_are_read_as_stored_with_a_warning():
    with torch.inference_mode():
        model = make_moe(32, 48, 4, 2, torch.float32)
        params = [p for p in model.parameters() if p.dim() == 3]
        x = torch.randn(5, 32)
        w, experts = torch.rand(5, 2), torch.randint(0, 4, (5, 2))
        spec = "experts{} -> f32"
        with pytest.warns(RuntimeWarning, match="carry no version"):
            got = torch.ops.moec.experts(x, w, experts, params, spec, "auto weights=packed")
        want = torch.ops.moec.experts(x, w, experts, params, spec, "auto")
    assert torch.equal(got, want)


def test_where_there_is_no_cpp_kernel_a_warning_says_so(model):
    x, params = torch.randn(5, 32), [p for p in model.parameters() if p.dim() == 3]
    w, experts = torch.rand(5, 2), torch.randint(0, 4, (5, 2))
    args = (x, w, experts, params, "experts{} -> f32")
    runtime._warn_unused.cache_clear()
    with pytest.warns(RuntimeWarning, match="weights are read as stored"):
        got = torch.ops.moec.experts(*args, "eager weights=int8")
    assert torch.equal(got, torch.ops.moec.experts(*args, "eager"))


def test_freeze_and_race_together(model, tmp_path, monkeypatch):
    from moec.runtime import tune_cache

    monkeypatch.setattr(tune_cache, "folder", lambda cache_dir=None: tmp_path / "tuned")
    x = torch.randn(9, 32)
    with torch.no_grad(), warnings.catch_warnings(), copies_made() as copies:
        warnings.simplefilter("error", RuntimeWarning)
        options = {"freeze": True, "race": "on", "rest": "eager"}
        compiled = torch.compile(model, backend="moec", options=options)
        for _ in range(2):
            assert relative(compiled(x), model(x)) < 1e-5
    assert len(copies) == 1
    assert [e.key.weights for e in tune_cache.load()] == ["packed"]


@pytest.mark.parametrize(
    "bad", ["int4", "int8:", "int8:0", "int8:-1", "int8:x", "", "INT8", "int8:9999999", "fp8:0", "fp8:x", "fp4"]
)
def test_other_weights_are_refused(bad):
    with pytest.raises(OptionError, match="expected stored, packed, bf16, int8, int8:N such as int8:128, fp8 or fp8:N"):
        Options.make({"weights": bad})
    with pytest.raises(OptionError, match="expected bool"):
        Options.make({"freeze": 1})


def test_engines_of_the_options():
    assert str(Options(freeze=True).engine(False)) == "auto weights=packed"
    assert str(Options(freeze=True, weights="int8:128", race="on").engine(False)) == "auto race weights=int8:128"
    assert str(Options(freeze=True, weights="int8").engine(True)) == "auto"
