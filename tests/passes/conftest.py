"""Capture a function, raise it, and run the raised graph by the plain meaning of its words."""

from __future__ import annotations

from types import ModuleType

import pytest
from beside import load_beside


@pytest.fixture(scope="session")
def meaning() -> ModuleType:
    """tests/passes/word_meanings.py"""
    return load_beside(__file__, "word_meanings")
