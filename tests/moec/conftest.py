"""Hand-made reports for the tests of people's views."""

from __future__ import annotations

from types import ModuleType

import pytest
from beside import load_beside


@pytest.fixture(scope="session")
def values() -> ModuleType:
    """tests/moec/report_values.py"""
    return load_beside(__file__, "report_values")
