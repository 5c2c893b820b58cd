"""The race: the fastest is kept and used, eager's form among them, once a size and host; results stay the same."""

import threading

import pytest
import torch

from moec.errors import OptionError
from moec.ir.engine import Engine
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.options import Options
from moec.runtime import race as runtime_race
from moec.runtime import tune_cache
from moec.runtime.cpu import load_kernel
from moec.runtime.race import Racer

SPEC = str(KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True)))
ONLY = str(KernelSpec(ExpertsSpec()))
H, F, E, K = 24, 20, 6, 2


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Results of their own; the kernel was built by whoever came first."""
    monkeypatch.setattr(tune_cache, "folder", lambda cache_dir=None: tmp_path / "tuned")
    tune_cache._load.cache_clear()
    runtime_race.racer.cache_clear()
    return tmp_path


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return torch.randn(E, H), [torch.randn(E, 2 * F, H) * 0.2, torch.randn(E, H, F) * 0.2]


@pytest.mark.parametrize("text", ["auto", "cpp race", "eager weights=int8:128", "auto race weights=packed"])
def test_engines_print_and_parse_back(text):
    assert str(Engine.parse(text)) == text


@pytest.mark.parametrize("text", ["auto fast", "auto weights=int4", "auto race race", "auto weights=int8:0", "auto "])
def test_other_engines_are_refused(text):
    with pytest.raises(OptionError):
        Engine.parse(text)


def test_options_say_how_ops_run():
    assert Options().engine(False) == Engine()
    assert str(Options(race="on", kernels="cpp").engine(False)) == "cpp race"
    assert str(Options(race="on").engine(True)) == "auto"


def timed_by(monkeypatch, seconds):
    """Time stands still but for what `seconds(runner)` says."""
    now = [0.0]
    monkeypatch.setattr(runtime_race.time, "perf_counter", lambda: now[0])
    calls = []

    def call(runner):
        calls.append(runner)
        now[0] += seconds(runner)
        return len(calls)

    return call, calls


def race(monkeypatch, seconds):
    kernel = load_kernel(ONLY, None)
    racer = Racer(kernel)
    call, calls = timed_by(monkeypatch, lambda runner: seconds(kernel, runner))
    sizes = kernel.sizes(torch.ones(300, H), [torch.ones(E, 2 * F, H), torch.ones(E, H, F)], K)
    assert racer.run(sizes, call) == 1  # the first call's own result, which is the kernel's
    assert calls[0] is kernel
    (entry,) = tune_cache.load()
    raced = len(calls)
    racer.run(sizes, call)
    again = Racer(kernel)
    again.run(sizes, call)
    assert len(calls) == raced + 2  # neither it nor a new process races again
    return entry, kernel, calls


def test_eager_wins_where_it_is_faster(monkeypatch):
    entry, _, calls = race(monkeypatch, lambda kernel, runner: 1e-3 if runner is None else 2e-3)
    assert entry.best == "eager"
    assert calls[-2:] == [None, None]
    assert (entry.eager, entry.default) == pytest.approx((1000, 2000))


def test_the_kernel_stays_where_eager_is_no_clear_winner(monkeypatch):
    entry, kernel, calls = race(monkeypatch, lambda kernel, runner: 0.97e-3 if runner is None else 1e-3)
    assert entry.best == "default"
    assert calls[-2:] == [kernel, kernel]


def test_a_plan_wins(monkeypatch):
    entry, kernel, calls = race(monkeypatch, lambda kernel, r: 2e-3 if r is None else 1.5e-3 if r is kernel else 1e-3)
    assert str(calls[-2].tuning) == entry.best
    assert kernel._stored(kernel.sizes(torch.ones(300, H), [torch.ones(E, 2 * F, H), torch.ones(E, H, F)], K), 1)


def test_a_winner_that_cannot_be_kept_is_used(monkeypatch, tmp_path):
    (tmp_path / "tuned").touch()  # where the folder should be
    runtime_race._warn_once.cache_clear()
    racer = Racer(load_kernel(ONLY, None))
    call, calls = timed_by(monkeypatch, lambda runner: 1e-3 if runner is None else 2e-3)
    sizes = racer.kernel.sizes(torch.ones(300, H), [torch.ones(E, 2 * F, H), torch.ones(E, H, F)], K)
    with pytest.warns(RuntimeWarning, match=r"not kept.*set MOEC_CACHE_DIR"):
        racer.run(sizes, call)
    racer.run(sizes, call)
    assert calls[-1] is None


def test_a_file_system_without_locks_keeps_nothing_and_says_so_as_a_full_one_does(monkeypatch):
    entry, _, _ = race(monkeypatch, lambda kernel, runner: 1e-3)

    def no_locks(path):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(tune_cache, "FileLock", no_locks)
    with pytest.raises(OSError, match="tuned: no flock here"):
        tune_cache.store([entry])


def test_a_long_call_does_not_race_for_long(monkeypatch):
    _, _, calls = race(monkeypatch, lambda kernel, runner: 1.0 if runner is None else 0.5)
    assert calls.count(None) == 2
    assert len(calls) <= 9


def test_a_short_race_stays_within_its_budget(monkeypatch):
    kernel = load_kernel(ONLY, None)
    call, calls = timed_by(monkeypatch, lambda runner: 0.002)
    runtime_race.times([kernel, None, kernel.tuned(None)], call)
    assert 0.002 * len(calls) <= runtime_race.BUDGET + 0.004


@pytest.mark.parametrize("T", [0, 1, 13, 200])
def test_results_are_those_of_the_kernel_or_eager(layer, T):
    w, params = layer
    x = torch.randn(T, H)
    want = torch.ops.moec.moe(x, [w], params, K, SPEC, "eager")
    for _ in range(2):
        got = torch.ops.moec.moe(x, [w], params, K, SPEC, "auto race")
        assert torch.equal(got[3], want[3])
        assert torch.allclose(got[0], want[0], atol=1e-4)
        y = torch.ops.moec.experts(x, want[2], want[3], params, ONLY, "cpp race")
        assert torch.allclose(y, want[0], atol=1e-4)
    assert len(tune_cache.load()) == (2 if T else 0)
    assert all(entry.eager > 0 and entry.by == "race" for entry in tune_cache.load())


def test_threads_that_meet_in_a_race_all_get_results(layer):
    w, params = layer
    x = torch.randn(64, H)
    want = torch.ops.moec.moe(x, [w], params, K, SPEC, "eager")[0]
    got = [None] * 4

    def call(i):
        got[i] = torch.ops.moec.moe(x, [w], params, K, SPEC, "auto race")[0]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(y, want, atol=1e-4) for y in got)


def test_compiled_with_the_option(layer):
    from moec.demo.forms import make_moe

    model = make_moe(32, 16, 4, 2, torch.float32)
    x = torch.randn(9, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="moec", options={"race": "on", "rest": "eager"})
        assert torch.allclose(compiled(x), model(x), atol=1e-4)
    assert len(tune_cache.load()) == 1
