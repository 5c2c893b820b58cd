"""A call that fails for the model's own sake is told from one that fails in the compiler."""

from __future__ import annotations

import logging

import pytest
import torch

import moec
from moec.errors import ModelError
from moec.own_error import own_errors

LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


class Layer(torch.nn.Module):
    """Fails on rows that are not 4 wide, and where it is told to."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, fail=False):
        if fail:
            raise ValueError("told\nto")
        return self.linear(x)


def test_wrong_arguments_are_the_models_own_error_and_torch_logs_nothing(caplog):
    LOGGER.addHandler(caplog.handler)
    says = r"with and without moec: RuntimeError: mat1 and mat2 .*test_own_error\.py:\d+"
    try:
        with pytest.raises(ModelError, match=says) as caught:
            moec.explain(Layer(), torch.randn(2, 3))
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((torch.randn(2, 4), True), {}, "ValueError: told to"),
        ((torch.randn(2, 4), 1, 2), {}, "takes from 2 to 3 positional arguments but 4 were given"),
        ((torch.randn(2, 4),), {"mask": None}, "unexpected keyword argument 'mask'"),
    ],
)
def test_errors_of_the_model_are_one_line(args, kwargs, says):
    with pytest.raises(ModelError, match=says) as caught:
        moec.explain(Layer(), *args, **kwargs)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_called_is_named():
    with pytest.raises(ModelError, match="the model is NoneType, which cannot be called"):
        moec.explain(None, torch.randn(2, 4))


def fails_in_the_compiler():
    with own_errors(Layer(), (torch.randn(2, 4),), {}):
        LOGGER.error("what torch says")
        raise KeyError("compiler")


def test_an_error_that_eager_has_not_stays_what_it_was_with_its_log(caplog):
    LOGGER.addHandler(caplog.handler)
    try:
        with pytest.raises(KeyError, match="compiler"):
            fails_in_the_compiler()
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"what torch says"}
    assert not LOGGER.filters
