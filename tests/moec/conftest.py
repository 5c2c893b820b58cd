"""Hand-made reports for the tests of people's views."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_NAME = "moec_tests_report_values"


@pytest.fixture(scope="session")
def values() -> ModuleType:
    """tests/moec/report_values.py: importlib mode puts no test folder on the path."""
    if _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name("report_values.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[_NAME]
