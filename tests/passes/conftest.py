"""Capture a function, raise it, and run the raised graph by the plain meaning of its words."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    """A helper beside this file: importlib mode puts no test folder on the path."""
    full = f"moec_tests_passes_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def meaning() -> ModuleType:
    """tests/passes/word_meanings.py"""
    return _load("word_meanings")
