"""A recording backend that says it is moec's, and rolling switched on for the time of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.fx import GraphModule

from moec.capture import install
from moec.capture.lower import lower_regions
from moec.capture.settle import settle
from moec.capture.state import NotRolled


class Recorder:
    """A backend: keeps what it is given, runs regions as loops."""

    __moec_backend__ = True

    def __init__(self, finish: Callable[[GraphModule], Callable] = lambda gm: lower_regions(gm).forward) -> None:
        self.graphs: list[GraphModule] = []
        self.code: list[str] = []
        self.declined: tuple[NotRolled, ...] = ()
        self.finish = finish

    def __call__(self, gm: GraphModule, example_inputs: list[object]) -> Callable:
        self.declined = settle(gm)
        self.graphs.append(gm)
        self.code.append(gm.code)
        return self.finish(gm)

    @property
    def anchors(self) -> int:
        return sum(code.count("torch.ops.moec.anchor") for code in self.code)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make_recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture(scope="session", autouse=True)
def leave_nothing() -> Iterator[None]:
    yield
    install.uninstall()


@pytest.fixture(autouse=True)
def rolling() -> None:
    torch._dynamo.reset()
    install.install()  # milliseconds, unless the test before took it off
    torch.manual_seed(0)
