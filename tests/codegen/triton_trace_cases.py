"""Launches and bytes of real calls in Triton's interpreter. Run by test_triton.py in its own process."""

import pytest
import torch
import zoo
from moe_reference import make_params, routing
from quick_interpreter import quick  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import ATOMIC, DECODE, SORTED, with_gate
from triton_trace import trace

from moec.backend import Backend
from moec.codegen.plan import Sizes
from moec.codegen.traffic import Load, moved_bytes
from moec.codegen.triton_launch import program
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.options import Options
from moec.runtime.triton import TritonKernel

OPTIONS = {"kernels": "triton", "rest": "eager", "proof": "off"}


class Calls(TorchDispatchMode):
    """The aten operations that run below moec's own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tokens", "most"), [(1, 3), (40, 4)])
def test_launches_of_a_layer(tokens, most, monkeypatch):
    """At most 3 a layer at decode and 4 otherwise, in a whole compiled model."""
    model, ids = zoo.library_model("qwen3_moe", "eager"), zoo.prompt(tokens, batch=1)
    layers = zoo.MODELS["qwen3_moe"][2]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=Backend(Options.make(OPTIONS)))
    launches = trace(monkeypatch)
    with torch.no_grad():
        compiled(ids, use_cache=False)
    names = [launched.kernel for launched in launches]
    assert 0 < len(names) <= most * layers, names
    assert len(set(names)) * layers == len(names), names


@pytest.mark.parametrize("config", [SORTED, DECODE], ids=lambda c: c.variant)
def test_nothing_but_kernels_runs(config):
    """Beside its launches a call allocates, and does nothing else."""
    spec = KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True))
    kernel = TritonKernel(spec, torch.device("cpu"))
    kernel.config_for = lambda sizes: config
    params, x = make_params(spec.experts, 16, 16, 4), torch.randn(3, 16)
    kernel.moe(x, [torch.randn(4, 16)], params, 2)
    monkey = pytest.MonkeyPatch()
    from triton.runtime import interpreter

    ran = []
    monkey.setattr(interpreter.GridExecutor, "__call__", lambda self, *a, **k: ran.append(self.fn.__name__))
    with Calls() as calls:
        kernel.moe(x, [torch.randn(4, 16)], params, 2)
    monkey.undo()
    assert len(ran) == {"sorted": 4, "decode": 3}[config.variant]
    free = ("empty", "new_empty", "randn", "detach", "view", "slice", "contiguous")
    assert all(any(f".{word}." in name for word in free) for name in calls.names), calls.names


FORMS = [
    (with_gate("concat", "nk", True, True, "output", "bf16"), SORTED),
    (with_gate("separate", "kn", True, False, "input"), SORTED),
    (with_gate("interleaved", "nk", True, True, "output", "bf16"), ATOMIC),
    (with_gate("concat", "kn", True, True, "output"), DECODE),
    (KernelSpec(ExpertsSpec("bf16"), RouterSpec(renormalize=True, weight_dtype="bf16"), "bf16"), SORTED),
    (KernelSpec(ExpertsSpec("bf16"), RouterSpec(renormalize=True, weight_dtype="bf16"), "bf16"), DECODE),
]


@pytest.mark.parametrize(("spec", "config"), FORMS, ids=str)
def test_bytes_are_those_that_the_arguments_say(spec, config, monkeypatch):
    """The model against what the interpreter really touched, of each argument of each launch."""
    T, H, F, E, k = 7, 32, 48, 5, 2
    kernel = TritonKernel(spec, torch.device("cpu"))
    kernel.config_for = lambda sizes: config
    params = [p.contiguous() for p in make_params(spec.experts, H, F, E)]
    dtype = DTYPES[spec.experts.dtype]
    x = torch.randn(T, H).to(dtype)
    launches = trace(monkeypatch)
    if spec.router:
        experts = kernel.moe(x, [torch.randn(E, H).to(dtype)], params, k)[3]
    else:
        weights, experts = routing("random", T, E - 1, k)
        kernel.experts(x, weights, experts, params)
    histogram = torch.bincount(experts.flatten(), minlength=E).tolist()
    load = Load(spec, Sizes(T, H, F, E, k), histogram)
    said = moved_bytes(load, program(spec, load.sizes, config))
    said.pop("zeros", None)
    assert [launched.kernel for launched in launches] == list(said)
    for launched in launches:
        real, model = launched.bytes(), said[launched.kernel]
        assert set(real) == set(model)
        for name, count in real.items():
            small = name in ("offsets", "tile_expert", "tile_row", "counters", "counts", "experts")
            expected = model["h"] if name == "saved" else model[name]  # it is given h, and touches none
            assert abs(count - expected) <= (80 if small else 0), (launched.kernel, name, count, expected)
