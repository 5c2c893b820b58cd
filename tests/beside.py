"""Helper modules that stand beside a test: importlib mode puts no test folder on the path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_beside(conftest: str, name: str) -> ModuleType:
    """`name`.py in the folder of `conftest` (its __file__), imported once."""
    folder = Path(conftest).parent
    full = f"moec_tests_{folder.name}_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]
