"""The fuzzer's helper modules."""

from __future__ import annotations

from types import ModuleType

import pytest
from beside import load_beside


@pytest.fixture(scope="session")
def grammar() -> ModuleType:
    """tests/fuzz/grammar.py"""
    return load_beside(__file__, "grammar")


@pytest.fixture(scope="session")
def checking() -> ModuleType:
    """tests/fuzz/checking.py"""
    return load_beside(__file__, "checking")
