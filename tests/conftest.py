"""Long tests are opt-in: without `-m`, what carries one of OPT_IN is deselected (and counted as such)."""

from __future__ import annotations

import pytest

OPT_IN = ("slow", "fuzz", "mutants")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=60.0, help="how long `-m fuzz` makes and tries modules")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    long = [item for item in items if any(item.get_closest_marker(name) for name in OPT_IN)]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
