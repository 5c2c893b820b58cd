"""Python's cyclic garbage collector, off while a graph is rewritten."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Generator[None]:
    """Within it nothing is collected by itself.

    Passes make some hundred objects a node and few cycles, in a process where torch alone has a million objects: the
    collections that this sets off take up to half of the passes' time and find nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
