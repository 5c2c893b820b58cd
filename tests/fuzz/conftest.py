"""The fuzzer's option and its helpers: importlib mode puts no test folder on the path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    full = f"moec_tests_fuzz_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def grammar() -> ModuleType:
    """tests/fuzz/grammar.py"""
    return _load("grammar")


@pytest.fixture(scope="session")
def checking() -> ModuleType:
    """tests/fuzz/checking.py"""
    return _load("checking")
