"""The options of the long fuzz run (`-m fuzz`), and what every test sees of the terminal."""

from __future__ import annotations

import os

import pytest


def pytest_configure() -> None:
    os.environ.pop("COLUMNS", None)  # the commands print as into a pipe, also where tests run in several processes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=60.0, help="how long `-m fuzz` makes and tries modules")
    parser.addoption("--fuzz-modules", type=int, default=1_000_000, help="after how many modules `-m fuzz` ends sooner")
