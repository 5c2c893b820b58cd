"""Calls like one before: run without Python where only numbers of x are new, in each thread's own memory."""

import ctypes
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pytest
import torch

import moec.runtime.ops  # noqa: F401  # registers the ops
from moec.errors import CodegenError, MoecError
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime import calls as runtime_calls
from moec.runtime.calls import calls, forget
from moec.runtime.copies import copies_made
from moec.runtime.cpu import Again, Kernel, load_kernel

H, F, E, K = 24, 20, 6, 2
SPEC = str(KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True)))
BIASED = str(KernelSpec(ExpertsSpec(), RouterSpec(bias=True, renormalize=True)))
ONLY = str(KernelSpec(ExpertsSpec()))
SEPARATE = str(KernelSpec(ExpertsSpec(gate="separate", stacked=False)))


def moe(x, layer, engine="auto", spec=SPEC, k=K):
    router, params = layer
    return torch.ops.moec.moe(x, router, params, k, spec, engine)


def experts(x, choice, params, engine="auto", spec=ONLY):
    return torch.ops.moec.experts(x, *choice, params, spec, engine)


def choose(tokens):
    weights, chosen = torch.rand(tokens, E).topk(K)
    return weights, chosen


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def nothing_kept():
    torch.manual_seed(0)
    forget()
    yield
    forget()


@pytest.fixture
def layer():
    return [torch.randn(E, H)], [torch.randn(E, 2 * F, H) * 0.2, torch.randn(E, H, F) * 0.2]


@pytest.fixture
def by_python(monkeypatch):
    """The kernels that Python called, one entry a call; the library is loaded before."""
    calls()
    seen: list[str] = []
    run = Kernel._run

    def counted(self, function, *rest):
        seen.append("moe" if function is self._call_moe else "experts")
        return run(self, function, *rest)

    monkeypatch.setattr(Kernel, "_run", counted)
    return seen


@pytest.mark.parametrize("T", [1, 7, 13, 200])
def test_a_call_like_one_before_skips_python(layer, by_python, T):
    moe(torch.randn(T, H), layer)
    for _ in range(3):
        x = torch.randn(T, H)
        assert_equal(moe(x, layer), moe(x, layer, "eager"))
    assert by_python == ["moe"]


@pytest.mark.parametrize("T", [1, 13, 200])
def test_so_do_experts_alone(layer, by_python, T):
    params = layer[1]
    experts(torch.randn(T, H), choose(T), params)
    for _ in range(3):
        x, choice = torch.randn(T, H), choose(T)
        assert_equal([experts(x, choice, params)], [experts(x, choice, params, "eager")])
    assert by_python == ["experts"]


def test_experts_that_are_modules(by_python):
    params = [torch.randn(*shape) * 0.2 for shape in ((F, H), (F, H), (H, F)) for _ in range(E)]
    for _ in range(3):
        x, choice = torch.randn(7, H), choose(7)
        got = experts(x, choice, params, spec=SEPARATE)
        assert_equal([got], [experts(x, choice, params, "eager", spec=SEPARATE)])
    params[4] = torch.randn(F, H)  # a parameter that was set anew lies elsewhere
    x, choice = torch.randn(7, H), choose(7)
    got = experts(x, choice, params, spec=SEPARATE)
    assert_equal([got], [experts(x, choice, params, "eager", spec=SEPARATE)])
    assert by_python == ["experts"] * 2


def test_results_are_each_calls_own(layer):
    x = torch.randn(7, H)
    first, second = moe(x, layer), moe(x, layer)
    third = moe(2 * x, layer)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert len({a.data_ptr(), b.data_ptr(), c.data_ptr()}) == 3
    assert not torch.equal(second[0], third[0])


def test_weights_changed_in_place_are_seen(layer, by_python):
    x = torch.randn(7, H)
    moe(x, layer)
    layer[1][0].mul_(2)
    layer[0][0].neg_()
    assert_equal(moe(x, layer), moe(x, layer, "eager"))
    assert by_python == ["moe"]


UNLIKE = {
    "tokens": lambda x, layer: (x[:5], layer),
    "strides": lambda x, layer: (x.t().contiguous().t(), layer),
    "dtype": lambda x, layer: (x.bfloat16(), layer),
    "k": lambda x, layer: (x, layer, "auto", SPEC, 3),
    "engine": lambda x, layer: (x, layer, "cpp"),
    "spec": lambda x, layer: (x, layer, "auto", str(KernelSpec(ExpertsSpec(), RouterSpec()))),
    "a router elsewhere": lambda x, layer: (x, ([layer[0][0].clone()], layer[1])),
    "experts elsewhere": lambda x, layer: (x, (layer[0], [p.clone() for p in layer[1]])),
    "parameters' strides": lambda x, layer: (x, (layer[0], [layer[1][0], strided(layer[1][1])])),
}


def strided(out):
    """Other rows of the memory of `out`, which begin where it does."""
    return out.as_strided(out.shape, (out.stride(0) // 2, out.stride(1), 1))


@pytest.mark.parametrize("change", UNLIKE.values(), ids=UNLIKE.keys())
def test_what_differs_is_a_call_of_its_own(layer, by_python, change):
    x = torch.randn(7, H)
    moe(x, layer)
    changed = change(x, layer)
    found = moe(*changed)
    assert by_python == ["moe"] * 2
    forget()
    assert all(map(torch.equal, found, moe(*changed)))


def test_threads_are_part_of_a_call(layer, by_python):
    x, threads = torch.randn(7, H), torch.get_num_threads()
    moe(x, layer)
    torch.set_num_threads(threads + 1)
    try:
        assert_equal(moe(x, layer), moe(x, layer, "eager"))
    finally:
        torch.set_num_threads(threads)
    assert by_python == ["moe"] * 2


COPIED = {
    "experts' columns": lambda router, params: (router, [torch.randn(E, 2 * F, 2 * H)[..., ::2], params[1]]),
    "a router transposed": lambda router, params: ([router[0].t().contiguous().t()], params),
    "a router of another dtype": lambda router, params: ([router[0].double()], params),
}


@pytest.mark.parametrize("change", COPIED.values(), ids=COPIED.keys())
def test_what_is_copied_in_each_call_is_not_kept(layer, by_python, change):
    layer = change(*layer)
    x = torch.randn(7, H)
    for _ in range(2):
        assert_equal(moe(x, layer), moe(x, layer, "eager"))
    assert by_python == ["moe"] * 2


def test_a_choice_in_other_words_is_not_kept(layer, by_python):
    x, (weights, chosen) = torch.randn(7, H), choose(7)
    want = experts(x, (weights, chosen), layer[1], "eager")
    for choice in ((weights.double(), chosen), (weights, chosen.int()), (weights.t().contiguous().t(), chosen)):
        for _ in range(2):
            assert_equal([experts(x, choice, layer[1])], [want])
    assert by_python == ["experts"] * 6


def test_a_race_sees_each_call(layer):
    x = torch.randn(7, H)
    moe(x, layer, "auto race")
    assert not calls()._alive


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_calls_that_read_a_copy(layer, by_python, weights):
    """They are known until a number of the weights changes, then the copy is made anew and the old one let go."""
    engine = f"auto weights={weights}"
    x = torch.randn(7, H)
    with copies_made() as copies:
        for _ in range(3):
            first = moe(x, layer, engine)
        old = weakref.ref(calls()._alive[0][1])
        layer[1][0].mul_(2)
        for _ in range(3):
            second = moe(x, layer, engine)
    assert by_python == ["moe"] * 2
    assert len(copies) == 2
    assert old() is None
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if weights == "packed" else {"atol": 0.3, "rtol": 0.1}
    torch.testing.assert_close(second[0], moe(x, layer, "eager")[0], **tolerance)
    assert not torch.equal(first[0], second[0])


def test_a_copy_of_memory_that_is_anothers_now(layer, by_python):
    """A layer that is gone leaves its address to the next, of the same shapes and versions."""
    x, router = torch.randn(7, H), layer[0]
    for _ in range(4):
        params = [torch.randn(E, 2 * F, H) * 0.2, torch.randn(E, H, F) * 0.2]
        for _ in range(2):
            assert_equal(moe(x, (router, params), "auto weights=packed"), moe(x, (router, params), "eager"))
        del params
    assert by_python == ["moe"] * 4
    assert len(calls()._alive) == 1


def test_no_tokens_are_not_kept(layer, by_python):
    for _ in range(2):
        assert moe(torch.randn(0, H), layer)[0].shape == (0, H)
    assert by_python == []


def test_a_biased_router(layer, by_python):
    router = [*layer[0], torch.randn(E)]
    for _ in range(2):
        x = torch.randn(7, H)
        assert_equal(moe(x, (router, layer[1]), spec=BIASED), moe(x, (router, layer[1]), "eager", spec=BIASED))
    router[1] = torch.randn(2 * E)[::2]  # copied
    for _ in range(2):
        assert_equal(moe(x, (router, layer[1]), spec=BIASED), moe(x, (router, layer[1]), "eager", spec=BIASED))
    assert by_python == ["moe"] * 3


def test_threads_at_once_have_memory_of_their_own(layer):
    x = {T: torch.randn(T, H) for T in (1, 7, 200)}
    want = {T: moe(x[T], layer, "eager")[0] for T in x}
    wrong: list[int] = []
    spaces: set[int] = set()

    def run():
        for i in range(60):
            T = (1, 7, 200)[i % 3]
            if not torch.allclose(moe(x[T], layer)[0], want[T], atol=1e-4):
                wrong.append(T)
            if i % 20 == 19:
                forget()
        spaces.add(calls().workspace(0))
        done.wait()  # what a thread holds is freed when it ends

    done = threading.Barrier(4)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(spaces) == 4


def test_a_call_that_runs_keeps_none_from_being_remembered(layer, monkeypatch):
    """And what it reads is let go of behind it."""
    running, over, gone = threading.Event(), threading.Event(), threading.Event()
    x = torch.randn(7, H)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def slow(words):
        if running.is_set() or not known:
            return
        running.set()
        over.wait()

    known: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(load_kernel(SPEC, torch.float32), "_call_moe", slow)
        moe(x, layer)
    known.append(True)
    call = threading.Thread(target=moe, args=(x, layer))
    call.start()
    running.wait()
    moe(torch.randn(5, H), layer)  # returns: what it leaves to be remembered waits for nobody
    assert len(calls()._alive) == 2
    letting = threading.Thread(target=lambda: (forget(), gone.set()))
    letting.start()
    assert not gone.wait(0.2)
    over.set()
    for thread in (call, letting):
        thread.join()
    assert gone.is_set()


def test_threads_load_the_library_once(monkeypatch):
    loads: list[int] = []

    def load():
        loads.append(1)
        time.sleep(0.05)
        return "loaded"

    monkeypatch.setattr(runtime_calls, "_load", lru_cache(maxsize=1)(load))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: runtime_calls.calls(), range(4))) == ["loaded"] * 4
    assert len(loads) == 1


def test_errors_pass_through_unchanged(layer):
    x = torch.randn(7, H)
    moe(x, layer)
    with pytest.raises(CodegenError, match=r"x is \[7, 25\], but the experts' parameters want \[T, 24\]"):
        moe(torch.randn(7, H + 1), layer)
    with pytest.raises(CodegenError, match="got float32, float64"):
        moe(x.double(), layer, "cpp")
    assert_equal(moe(x, layer), moe(x, layer, "eager"))


def test_a_call_inside_an_unknown_one_is_not_taken_for_it(layer, monkeypatch, by_python):
    """What is remembered is the innermost call that Python makes."""
    x, other = torch.randn(7, H), torch.randn(5, H)
    run = Kernel._run  # counted

    def with_another(self, function, tensors, *rest):
        if tensors.x.shape[0] == 7:
            moe(other, layer)
        return run(self, function, tensors, *rest)

    monkeypatch.setattr(Kernel, "_run", with_another)
    moe(x, layer)
    for _ in range(2):
        assert_equal(moe(x, layer), moe(x, layer, "eager"))
        assert_equal(moe(other, layer), moe(other, layer, "eager"))
    assert by_python == ["moe"] * 2


def test_a_kernel_called_from_python_is_not_taken_for_a_call(layer):
    kernel = load_kernel(SPEC, torch.float32)
    kernel.moe(torch.randn(7, H), *layer, K, Again())
    assert not calls()._alive


def test_more_calls_than_are_kept(layer, by_python, monkeypatch):
    monkeypatch.setattr(runtime_calls, "_MOST", 3)
    for T in (1, 2, 3, 4, 1, 4):
        x = torch.randn(T, H)
        assert_equal(moe(x, layer), moe(x, layer, "eager"))
    assert len(by_python) == 5
    assert len(calls()._alive) == 2


def test_no_memory_is_said():
    with pytest.raises(MoecError, match=r"no memory for a kernel's workspace of 4,611,686,018,427,387,904 bytes; call"):
        calls().workspace(1 << 62)
    assert calls().workspace(1) % 4096 == 0


def test_results_under_inference_mode(layer):
    x = torch.randn(7, H)
    moe(x, layer)
    with torch.inference_mode():
        assert all(t.is_inference() for t in moe(x, layer))
    assert not any(t.is_inference() for t in moe(x, layer))


def test_gradients_still_flow_through_experts(layer):
    params = [p.clone().requires_grad_() for p in layer[1]]
    x, choice = torch.randn(7, H, requires_grad=True), choose(7)
    want = torch.autograd.grad(experts(x, choice, params, "eager").square().sum(), [x, *params])
    for _ in range(2):
        got = torch.autograd.grad(experts(x, choice, params).square().sum(), [x, *params])
        assert_equal(got, want)
