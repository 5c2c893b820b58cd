import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """Kernels are built anew for every run of the tests, and only once in it."""
    folder = tmp_path_factory.mktemp("kernels")
    before = os.environ.get("MOEC_CACHE_DIR")
    os.environ["MOEC_CACHE_DIR"] = str(folder)
    yield folder
    os.environ.pop("MOEC_CACHE_DIR")
    if before is not None:
        os.environ["MOEC_CACHE_DIR"] = before
