"""Memory of a GPU that outlives the call that made it: outside of every CUDA graph, and written before it is read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded as a CUDA graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def outside_of_graphs(make: Callable[[], T], device: torch.device) -> T:
    """`make()`, its memory on `device` taken from no CUDA graph's pool.

    While torch warms a graph up, its pool serves all that the calling thread allocates, and what is still there after
    the call is an error (`mode="reduce-overhead"`). So a thread of its own allocates, for the caller's stream.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)

    def there() -> T:
        with torch.cuda.stream(stream), torch.no_grad():
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(there).result()


class Fence:
    """Keeps other streams from reading what one stream has not written yet; costs nothing once it is written."""

    def __init__(self, device: torch.device) -> None:
        self._written: torch.cuda.Event | None = None
        if device.type == "cuda" and not capturing(device):
            self._written = torch.cuda.Event()
            self._written.record(torch.cuda.current_stream(device))

    def wait(self, device: torch.device) -> None:
        """Let the current stream wait for what was launched before the fence was made."""
        written = self._written
        if written is None or capturing(device):  # a recording begins after all other work has ended
            return
        if written.query():
            self._written = None
        else:
            torch.cuda.current_stream(device).wait_event(written)
