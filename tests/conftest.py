"""What every test sees: a run's one folder of built kernels, the terminal of a pipe, and the fuzzer's options."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

FIRST = (
    "tests/codegen/test_triton.py",
    "tests/test_benchmarks.py",
    "tests/test_models.py",
    "tests/test_examples.py",
    "tests/test_readme.py",
    "tests/test_spellings_tables.py",
    "tests/test_spellings.py",
    "tests/fuzz/test_fuzz.py",
    "tests/fuzz/test_mutants.py",
    "tests/moec/demo/test_run.py",
    "tests/moec/compare/test_ways.py",
    "tests/moec/tune/test_search.py",
    "tests/moec/runtime/test_ops.py",
)
"""Files that take longest, in that order: one of them at the end would leave the other cores without work."""

SPELLED = ("test_spelling", "test_loops", "test_library_forms", "test_autocast", "test_declined")
"""Files in which it is on trial what a layer is taken for; kernels themselves are on trial in tests/codegen."""


def pytest_configure() -> None:
    os.environ.pop("COLUMNS", None)  # the commands print as into a pipe, also where tests run in several processes
    # Inductor's pool of processes compiles Triton's kernels: here there are none, and each process imports torch.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=60.0, help="how long `-m fuzz` makes and tries modules")
    parser.addoption("--fuzz-modules", type=int, default=1_000_000, help="after how many modules `-m fuzz` ends sooner")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(FIRST)))


def pytest_collection_finish() -> None:
    """No text of graphs and guards for pytest, which listens to every logger that does not propagate: also to the one
    by which torch asks whether somebody wants them. And what the imports made stays: the collector need not look at it
    again in every compile."""
    logging.getLogger("torch.__trace").propagate = True
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_dir(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kernels are built anew for every run of the tests, and only once in it: all processes of a run share them."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):  # of one process of several; above it is the run's own
        folder = folder.parent
    # A test that starts pytest itself hands its folder on.
    folder = Path(os.environ.get("MOEC_TESTS_CACHE", folder / "kernels"))
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEC_TESTS_CACHE", str(folder))
        patch.setenv("MOEC_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def guards_are_not_timed() -> Iterator[None]:
    """Dynamo times its guards, on a flushed cache, for a line in its log: a twentieth of a small layer's compile."""
    from torch._dynamo import guards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "profile_guard_manager", lambda root, scope, rounds: 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def shapes_are_not_remembered() -> Iterator[None]:
    """Fake tensors' cache makes each result twice, to see if it can be kept; a layer asks for few results again."""
    from torch._dynamo import config

    with config.patch(fake_tensor_cache_enabled=False):
        yield


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built_plainly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Spelled layers have many specs, each with kernels of its own: unoptimised they are built in less than half the
    time."""
    if not request.path.name.startswith(SPELLED):
        yield
        return
    from moec.codegen import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FLAGS_FAST", (*build._FLAGS_FAST, "-O0"))
        _forget_kernels()
        yield
    _forget_kernels()


def _forget_kernels() -> None:
    from moec.runtime import backward, backward_ops, calls, cpu, ops

    for loaded in (cpu._load, backward._load, ops._kernel_or_warning, backward_ops.gradient_kernel):
        loaded.cache_clear()
    calls.forget()
