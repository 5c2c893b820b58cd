"""The options of the long fuzz run (`-m fuzz`)."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=60.0, help="how long `-m fuzz` makes and tries modules")
    parser.addoption("--fuzz-modules", type=int, default=1_000_000, help="after how many modules `-m fuzz` ends sooner")
