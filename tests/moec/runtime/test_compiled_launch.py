"""Kernels are launched by addresses, without what Triton does at each launch, and as the compiler was promised."""

import sys
from pathlib import Path

import pretended_gpu as gpus
import pytest
import torch
from triton import knobs
from triton.runtime import jit

import moec
from moec.codegen.triton_emit import _load
from moec.errors import BuildError
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime import ops as runtime
from moec.runtime.backward_ops import gradient_kernel
from moec.runtime.triton import load_triton
from moec.runtime.triton_backward import load_triton_backward
from moec.target import gpu_figures

H, F, E, K = 64, 32, 8, 2
CACHES = (load_triton, load_triton_backward, gpu_figures, runtime._kernel_or_warning, gradient_kernel, _load)
SPEC = KernelSpec(ExpertsSpec(dtype="bf16"), RouterSpec(renormalize=True), "bf16")


@pytest.fixture(autouse=True, scope="module")
def guard(tmp_path_factory):
    gpus.register_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """What was made for a pretended device must not be found for another."""
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def params_of(width=F):
    return [gpus.tensor(E, *SPEC.experts.shape(g, H, width), dtype=torch.bfloat16) for g in SPEC.experts.param_groups]


def caller(T, x=None, params=None, engine="auto"):
    """A call of the op over tensors that stay."""
    x = gpus.tensor(T, H, dtype=torch.bfloat16) if x is None else x
    router, params = [gpus.tensor(E, H, dtype=torch.bfloat16)], params or params_of()
    return lambda: runtime._moe(x, router, params, K, str(SPEC), engine)


def shifted(*shape, dtype=torch.bfloat16):
    """A tensor that begins one element behind an aligned address."""
    with gpus.MODE:
        count = torch.Size(shape).numel()
        return torch.empty(count + 1, dtype=dtype, device="cuda:1")[1:].view(shape)


@pytest.mark.parametrize("T", [1, 100])
def test_a_second_call_asks_triton_for_nothing(monkeypatch, T):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    call = caller(T)
    call()
    first, compiled = list(gpu.launches), list(gpu.compiled)
    monkeypatch.setattr(jit.JITFunction, "run", lambda *a, **k: pytest.fail("Triton's own launch"))
    call()
    second = gpu.launches[len(first) :]
    assert [(e.kernel, e.grid, e.stream, e.options) for e in second] == [
        (e.kernel, e.grid, e.stream, e.options) for e in first
    ]
    assert gpu.compiled == compiled
    constants = [{n: v for n, v in e.arguments.items() if e.signature[n] == "constexpr"} for e in gpu.launches]
    assert constants[: len(first)] == constants[len(first) :]


def test_addresses_are_those_of_the_tensors(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    x, params = gpus.tensor(100, H, dtype=torch.bfloat16), params_of()
    call = caller(100, x, params)
    for _ in range(2):
        y, logits, weights, chosen = call()
        router, route, gate_up, down = (each.arguments for each in gpu.launches[-4:])
        assert router["x"] == gate_up["x"] == x.data_ptr()
        assert (route["logits"], route["weights"]) == (logits.data_ptr(), weights.data_ptr())
        assert route["experts"] == chosen.data_ptr()
        assert all(router[name] == route[name] for name in ("parts", "counts", "counters"))
        assert (gate_up["ab"], down["out"], down["y"]) == (params[0].data_ptr(), params[1].data_ptr(), y.data_ptr())
        assert gate_up["h"] == down["h"]
        buffers = {route[n] for n in ("order", "offsets", "tile_expert", "tile_row", "counters", "counts")}
        assert len(buffers | {down["h"], down["slots"]}) == 8
        assert all(address % 256 == 0 for address in buffers)
        assert all(down[name] == route[name] for name in ("order", "offsets", "counters"))


def test_what_is_not_aligned_has_kernels_of_its_own(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    aligned, params = caller(100), params_of()
    params[1] = shifted(*params[1].shape)
    odd_x, odd_out = caller(100, shifted(100, H)), caller(100, params=params)
    promised = []
    for call in (aligned, odd_x, odd_out, aligned, odd_x, odd_out):
        gpu.launches.clear()
        call()
        promised.append({(e.kernel, n) for e in gpu.launches for n in e.arguments if _aligned(e, n)})
        for each in gpu.launches:
            assert all(each.arguments[n] % 16 == 0 for n in each.arguments if _aligned(each, n)), each.kernel
    assert promised[:3] == promised[3:]
    assert promised[0] - promised[1] == {("router", "x"), ("gate_up", "x")}
    assert promised[0] - promised[2] == {("down", "out")}
    assert len(gpu.compiled) == 4 + 2 + 1


def _aligned(launch, name):
    where = list(launch.signature).index(name)
    return launch.signature[name].startswith("*") and ["tt.divisibility", 16] in launch.attrs.get((where,), [])


def test_amd_is_told_which_tensors_are_beyond_32_bits(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.MI300)
    caller(600, params=params_of(1 << 21))()
    (gate_up,) = (e for e in gpu.launches if e.kernel == "gate_up")
    near = {list(gate_up.signature)[i] for (i,), attrs in gate_up.attrs.items() if ["tt.pointer_range", 32] in attrs}
    assert {"x", "h", "order"} & near == {"x", "order"}  # h: 1200 rows of 2²¹ numbers
    assert "ab" not in near
    caller(100)()
    assert all(
        ["tt.pointer_range", 32] in gpu.launches[-1].attrs[(i,)]
        for i, kind in enumerate(gpu.launches[-1].signature.values())
        if kind.startswith("*")
    )


def test_hooks_of_a_profiler_are_called(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    call, seen = caller(100), []
    call()
    enter, leave = knobs.HookChain(), knobs.HookChain(reversed=True)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", enter)
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", leave)
    call()
    enter.add(lambda metadata: seen.append(("enter", metadata.get()["name"], metadata.get()["stream"])))
    call()
    leave.add(lambda metadata: seen.append(("leave", metadata.get()["name"], metadata.get()["stream"])))
    call()
    kernels = ["router", "route", "gate_up", "down"]
    enters = [("enter", name, 1001) for name in kernels]
    assert seen[:4] == enters
    assert seen[4:] == [(when, name, 1001) for name in kernels for when in ("enter", "leave")]
    launched = [(e.kernel, e.grid, list(e.arguments)) for e in gpu.launches]
    assert launched == launched[:4] * 4


def test_a_device_is_made_current_only_where_it_is_not(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    call = caller(100)
    call()
    for current, guarded in ((0, [1]), (1, [])):
        gpu.current = current
        gpu.guarded.clear()
        call()
        assert (gpu.guarded, gpu.current) == (guarded, current)
        assert {(e.device, e.stream) for e in gpu.launches[-4:]} == {(1, 1001)}


def test_kernels_of_one_device_are_not_launched_on_another(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    caller(100)()
    x = gpus.tensor(100, H, dtype=torch.bfloat16, device="cuda:0")
    router = [gpus.tensor(E, H, dtype=torch.bfloat16, device="cuda:0")]
    params = [gpus.tensor(*p.shape, dtype=p.dtype, device="cuda:0") for p in params_of()]
    runtime._moe(x, router, params, K, str(SPEC), "auto")
    assert len(gpu.compiled) == 8
    assert {(e.device, e.stream) for e in gpu.launches[4:]} == {(0, 1000)}


def test_sums_in_any_order_begin_as_zeros(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    zeroed, plain = [], torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda t: (zeroed.append((t.data_ptr(), t.numel())), plain(t))[1])
    caller(100, engine="triton combine=atomic")()
    assert zeroed == [(gpu.launches[-1].arguments["slots"], 4 * 100 * H)]


@pytest.mark.parametrize(("dtype", "stacked"), [("bf16", True), ("f32", True), ("bf16", False)])
@pytest.mark.parametrize("T", [1, 100])
def test_a_call_is_few_steps_of_python(monkeypatch, dtype, stacked, T):
    """Functions of moec and Triton that a call after the first enters: what the host does while a GPU waits."""
    gpus.pretend(monkeypatch, gpus.H100)
    spec = KernelSpec(ExpertsSpec(dtype=dtype, stacked=stacked), RouterSpec(renormalize=True), dtype)
    kind = DTYPES[dtype]
    shapes = [spec.experts.shape(group, H, F) for group in spec.experts.param_groups]
    params = [gpus.tensor(E, *s, dtype=kind) for s in shapes]
    if not stacked:
        params = [gpus.tensor(*s, dtype=kind) for s in shapes for _ in range(E)]
    x, router, text = gpus.tensor(T, H, dtype=kind), [gpus.tensor(E, H, dtype=kind)], str(spec)
    folders = tuple(str(Path(m.__file__).parent) for m in (moec, jit))
    entered = []

    def profile(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            entered.append(frame.f_code.co_name)

    runtime._moe(x, router, params, K, text, "auto")
    sys.setprofile(profile)
    runtime._moe(x, router, params, K, text, "auto")
    sys.setprofile(None)
    assert 10 < len(entered) <= 50, entered


def test_a_kernel_that_does_not_compile_is_tried_once(monkeypatch):
    gpus.pretend(monkeypatch, gpus.H100)
    tried = []

    def refusing(src, target=None, options=None, **_):
        tried.append(src.fn.fn.__name__)
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr("triton.compiler.compile", refusing)
    call = caller(100, engine="triton")
    for _ in range(2):
        with pytest.raises(BuildError, match="PassManager"):
            call()
    assert tried == ["router"]
