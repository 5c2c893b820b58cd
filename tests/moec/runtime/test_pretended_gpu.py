"""What a GPU would be asked to do: launches, devices, streams, memory. Tensors have no data, and none is waited for."""

import threading
import warnings

import pretended_gpu as gpus
import pytest
import torch
from torch import nn

from moec.backend import Backend, nothing_to_compile
from moec.codegen import twin
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig, default_config
from moec.codegen.triton_emit import emit
from moec.codegen.triton_launch import launches
from moec.errors import BuildError, CodegenError
from moec.gpu.target import family_of, gpu_target
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.options import Options
from moec.report import Report
from moec.runtime import bound as runtime_bound
from moec.runtime import ops as runtime
from moec.runtime import triton as runtime_triton
from moec.runtime import tune_cache
from moec.runtime.backward_ops import experts_backward, gradient_kernel
from moec.runtime.fallback import warn_once
from moec.runtime.triton import load_triton
from moec.runtime.triton_backward import load_triton_backward
from moec.runtime.tune_gpu_cache import gpu_key, gpu_made
from moec.target import gpu_figures

H, F, E, K = 64, 32, 8, 2
CACHES = (
    load_triton, load_triton_backward, gpu_figures, runtime._kernel_or_warning, gradient_kernel, warn_once,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def guard(tmp_path_factory):
    gpus.register_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    _forget()
    yield
    _forget()


def _forget():
    """What was made for a pretended device must not be found for another."""
    from moec.codegen.triton_emit import _load

    for cache in (*CACHES, _load, tune_cache._load):
        cache.cache_clear()


def spec_of(dtype="bf16", stacked=True, router=True, on="output"):
    experts = ExpertsSpec(dtype=dtype, stacked=stacked, weight_on=on)
    return KernelSpec(experts, RouterSpec(renormalize=True) if router else None, dtype)


def params_of(spec, device="cuda:1"):
    e, dtype = spec.experts, DTYPES[spec.experts.dtype]
    shapes = [e.shape(group, H, F) for group in e.param_groups]
    if e.stacked:
        return [gpus.tensor(E, *shape, dtype=dtype, device=device) for shape in shapes]
    return [gpus.tensor(*shape, dtype=dtype, device=device) for shape in shapes for _ in range(E)]


def moe(spec, T, params=None, engine="auto", x=None):
    dtype = DTYPES[spec.experts.dtype]
    x = gpus.tensor(T, H, dtype=dtype) if x is None else x
    return runtime._moe(x, [gpus.tensor(E, H, dtype=dtype)], params or params_of(spec), K, str(spec), engine)


def experts(spec, T, params, engine="auto"):
    x, weights = gpus.tensor(T, H, dtype=DTYPES[spec.experts.dtype]), gpus.tensor(T, K)
    return runtime._experts(x, weights, gpus.tensor(T, K, dtype=torch.int64), params, str(spec), engine)


@pytest.mark.parametrize("properties", [gpus.H100, gpus.A100, gpus.MI300], ids=["H100", "A100", "MI300"])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("T", [1, 100])
def test_launches_are_on_the_tensors_device_and_stream(monkeypatch, properties, dtype, T):
    gpu = gpus.pretend(monkeypatch, properties)
    y, logits, weights, chosen = moe(spec_of(dtype), T)
    few = ["decode_logits", "decode_route_gate_up", "decode_down"]
    assert [each.kernel for each in gpu.launches] == (few if T == 1 else ["router", "route", "gate_up", "down"])
    assert {(each.device, each.stream) for each in gpu.launches} == {(1, 1001)}  # while cuda:0 is the current one
    assert gpu.current == 0
    assert {t.device for t in (y, logits, weights, chosen)} == {torch.device("cuda:1")}
    assert all(t.is_contiguous() for t in (y, logits, weights, chosen))
    assert all(each.grid[1] <= 65535 and each.grid[2] <= 65535 and min(each.grid) > 0 for each in gpu.launches)
    before = len(gpu.compiled)
    moe(spec_of(dtype), T)
    assert len(gpu.compiled) == before


def test_no_tokens_launch_nothing(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    assert moe(spec_of(), 0)[0].shape == (0, H)
    assert experts(spec_of(router=False), 0, params_of(spec_of())).shape == (0, H)
    assert not gpu.launches


def test_another_number_of_tokens_compiles_nothing(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    for T in (500, 501, 509):
        moe(spec_of(), T)
    assert len(gpu.compiled) == 4


def test_rows_that_are_not_contiguous_compile_nothing_anew(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    for T in (500, 501):
        with gpus.MODE:
            x = torch.empty(H, T, dtype=torch.bfloat16, device="cuda:1").t()
        moe(spec_of(), T, x=x)
    assert len(gpu.compiled) == 4


def test_tables_of_addresses_live_outside_of_graphs(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    spec, made = spec_of(stacked=False), []
    plain = runtime_bound.table_of
    monkeypatch.setattr(
        runtime_bound, "table_of", lambda *a, **k: (made.append(threading.get_ident()), plain(*a, **k))[1]
    )
    params = params_of(spec)
    moe(spec, 100, params)
    assert len(made) == 2  # ab and out
    assert threading.get_ident() not in made
    tables = [each.arguments["out"] for each in gpu.launches if each.kernel == "down"]
    moe(spec, 100, params)
    assert len(made) == 2
    assert gpu.launches[-1].arguments["out"] == tables[0]
    with gpus.MODE:
        params[3] = params[3].clone()  # a parameter moved
    moe(spec, 100, params)
    assert len(made) == 4


def test_what_a_graph_records_is_not_kept(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    spec = spec_of(stacked=False)
    params, gpu.capturing = params_of(spec), True
    moe(spec, 100, params)
    gpu.capturing = False
    moe(spec, 100, params)
    first, second = (each.arguments["out"] for each in gpu.launches if each.kernel == "down")
    assert first != second


def test_other_streams_wait_for_a_table_until_it_is_written(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    spec = spec_of(stacked=False)
    params, gpu.pending = params_of(spec), True
    for _ in range(3):
        moe(spec, 100, params)
    assert gpu.waits == 3
    gpu.pending = False
    moe(spec, 100, params)
    gpu.pending = True
    moe(spec, 100, params)
    assert gpu.waits == 3


def test_tensors_on_two_devices_are_an_error(monkeypatch):
    gpus.pretend(monkeypatch, gpus.H100)
    for stacked in (True, False):
        spec = spec_of(stacked=stacked, router=False)
        with pytest.raises(CodegenError, match="cuda:0"):
            experts(spec, 100, params_of(spec, "cuda:0"))
    params = params_of(spec_of(stacked=False))
    params[1] = params_of(spec_of(stacked=False), "cuda:0")[1]
    with pytest.raises(CodegenError, match=r"cuda:0, cuda:1.*one device"):
        experts(spec_of(stacked=False, router=False), 100, params)


def test_less_shared_memory_means_fewer_stages(monkeypatch):
    from triton.runtime.errors import OutOfResources

    gpu = gpus.pretend(monkeypatch, gpus.H100)

    def refuses(kernel, options):
        if options["num_stages"] > 2 and kernel == "gate_up":
            raise OutOfResources(1, 0, "shared memory")

    gpu.refuses = refuses
    moe(spec_of(), 100)
    assert {e.kernel: e.options["num_stages"] for e in gpu.launches}["gate_up"] == 2


def test_what_does_not_compile_runs_in_torch_with_one_warning(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    spec, tries = spec_of(router=False), []

    def refuses(kernel, options):
        tries.append(kernel)
        raise RuntimeError("PassManager::run failed")

    gpu.refuses = refuses
    monkeypatch.setattr(twin, "experts", lambda *a: "eager")
    with pytest.warns(RuntimeWarning, match="PassManager"):
        assert experts(spec, 100, params_of(spec)) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert experts(spec, 100, params_of(spec)) == "eager"
    assert tries == ["dispatch"]
    with pytest.raises(BuildError, match="PassManager"):
        experts(spec, 100, params_of(spec), "triton")


def test_without_triton_torch_runs(monkeypatch):
    gpus.pretend(monkeypatch, gpus.H100)
    spec = spec_of(router=False)

    def missing():
        raise CodegenError("Triton cannot be imported")

    monkeypatch.setattr(runtime_triton, "triton", missing)
    monkeypatch.setattr(twin, "experts", lambda *a: "eager")
    with pytest.warns(RuntimeWarning, match="cannot be imported"):
        assert experts(spec, 100, params_of(spec)) == "eager"


@pytest.mark.parametrize(("properties", "rounded"), [(gpus.H100, True), (gpus.MI300, False)], ids=["H100", "MI300"])
def test_products_of_fp32_are_what_torch_is_allowed(monkeypatch, properties, rounded):
    gpu = gpus.pretend(monkeypatch, properties)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            moe(spec_of("f32"), 100)
    finally:
        torch.set_float32_matmul_precision(before)
    tiles = [each.arguments["BLOCK_N"] for each in gpu.launches if each.kernel == "gate_up"]
    assert tiles == [64, 128 if rounded else 64]
    assert (
        default_config(spec_of("f32"), Sizes(100, H, F, E, K), gpu_figures(torch.device("cuda:1")), True).tf32
        == rounded
    )


def test_what_was_tuned_is_used(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    spec = spec_of(router=False)
    figures, sizes = gpu_figures(torch.device("cuda:1")), Sizes(100, H, F, E, K)
    tuned = GpuConfig(64, 64, 64, num_warps=8, num_stages=2)
    key, made = gpu_key(spec, sizes, figures), gpu_made(spec, figures)
    tune_cache.store([tune_cache.Entry(key, made, str(tuned), "tune", "uniform", "2026-01-01", 1.0, 0.0, 2.0)])
    experts(spec, 100, params_of(spec))
    (launch,) = (each for each in gpu.launches if each.kernel == "gate_up")
    assert (launch.arguments["BLOCK_M"], launch.options["num_warps"], launch.options["num_stages"]) == (64, 8, 2)


def test_the_router_never_multiplies_in_tf32():
    plain, rounded = emit(spec_of("f32")), emit(spec_of("f32"), tf32=True)
    assert "tf32" not in plain
    changed = [line for line in rounded.splitlines() if "tf32" in line]
    assert changed == ['    return tl.dot(a, b, acc, input_precision="tf32")']


@pytest.mark.parametrize("stacked", [True, False])
def test_gradients_wait_for_nothing_and_can_be_recorded(monkeypatch, stacked):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    spec = spec_of(stacked=stacked, router=False)
    params, b = params_of(spec), torch.bfloat16
    for capturing in (False, True):
        gpu.capturing = capturing
        args = (gpus.tensor(100, H, dtype=b), gpus.tensor(100, H, dtype=b), gpus.tensor(100, K))
        chosen = gpus.tensor(100, K, dtype=torch.int64)
        needs = [True] * (2 + len(params))
        dx, dweights, dparams = experts_backward(*args, chosen, params, gpus.tensor(0), str(spec), "auto", needs)
        assert (dx.shape, dx.dtype, dweights.shape) == ((100, H), b, (100, K))
        assert [d.shape for d in dparams] == [p.shape for p in params]
    rows = ["dispatch", "permute", "permute", "backward_inputs", "backward_hidden"]
    names = [*rows, "backward_params", "backward_params", "backward_rows", "backward_tokens"]
    assert [each.kernel for each in gpu.launches] == 2 * names
    assert {each.device for each in gpu.launches} == {1}


def test_descriptors_get_scratch_memory_and_leave_the_users_allocator(monkeypatch):

    from triton.runtime import _allocation

    gpus.pretend(monkeypatch, gpus.H100)
    seen, spec = [], spec_of(router=False)
    plain = gpus.Kernel.run
    monkeypatch.setattr(
        gpus.Kernel, "run", lambda self, *a: (seen.append(_allocation._allocator.get()), plain(self, *a))[1]
    )
    before = _allocation._allocator.get()
    params = [gpus.tensor(*p.shape, dtype=torch.bfloat16) for p in params_of(spec)]
    experts(spec, 2000, params, "triton schedule=descriptors")
    assert _allocation._allocator.get() is before
    assert all(each is not before for each in seen)
    with gpus.MODE:
        assert seen[0](100, 16, None).device == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sm_70", "sm_75"), ("sm_87", "sm_86"), ("sm_90", "sm_90"), ("sm_103", "sm_100"), ("sm_121", "sm_120"),
        ("sm_130", "sm_130"), ("gfx941", "gfx942"), ("gfx942", "gfx942"), ("gfx1150", "gfx1150"),
    ],
)  # fmt: skip
def test_a_new_chip_is_treated_as_its_family(name, family):
    assert family_of(name) == family


def test_limits_are_the_devices_own(monkeypatch):
    gpus.pretend(monkeypatch, gpus.MI300)
    figures = gpu_figures(torch.device("cuda:1"))
    assert (figures.name, figures.shared_bytes, figures.processors) == ("gfx942", 64 << 10, 304)


@pytest.mark.parametrize("T", [1, 33, 4096, 1 << 20])
@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_grids_stay_below_the_limits(T, name):
    for spec in (spec_of(), spec_of("f32")):
        sizes = Sizes(T, 7168, 2048, 256, 8)
        for launch in launches(spec, sizes, default_config(spec, sizes, gpu_target(name))):
            x, y, z = (*launch.grid, 1, 1)[:3]
            assert 0 < x < 2**31, launch.kernel
            assert 0 < max(y, z) <= 65535, launch.kernel


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(H, F, bias=False), nn.Linear(H, F, bias=False)
        self.down = nn.Linear(F, H, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(H, E, bias=False), nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(K)
        y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen.to("cuda:1") == i)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


@pytest.mark.parametrize(("training", "kernels"), [(False, "moe_bf16_triton"), (True, "experts_bf16_triton")])
def test_a_model_on_a_gpu_gets_triton_kernels_and_a_proof(monkeypatch, training, kernels):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with gpus.MODE, torch.device("cuda:1"):
            model, x = Layer(), torch.empty(13, H)
    finally:
        torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()
    report = Report()
    options = Options.make({"rest": "eager" if training else "aot_eager"})
    with torch.set_grad_enabled(training):
        y = torch.compile(model, backend=Backend(options, report=report))(x)
    assert (y.device, y.shape, y.dtype) == (torch.device("cuda:1"), (13, H), torch.bfloat16)
    (site,) = report.sites
    assert (site.status, site.kernels) == ("fused", (kernels,))
    assert "proved" in site.proof and "unproved" not in site.proof, site.proof  # noqa: PT018


def test_a_mode_that_records_graphs_goes_to_inductor(monkeypatch):
    seen = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: seen.append(gm) or gm.forward)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, x):
            return self.layer(x)

    for mode in (None, "reduce-overhead"):
        with gpus.MODE, torch.device("cuda:1"):
            model, x = Experts(), torch.empty(13, H)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=Backend(Options(), mode))(x)
    assert [nothing_to_compile(gm) for gm in seen] == [True]
