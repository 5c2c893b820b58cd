"""Processes that a command starts: Ctrl-C is for the command alone, which says one line and ends them."""

from __future__ import annotations

import signal
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess


def start_child(process: BaseProcess) -> None:
    """Start `process` so that Ctrl-C in the terminal, which goes to all of a command, never reaches it.

    Else it would print a traceback of its own, in the middle of an import as a rule.
    """
    resource_tracker.ensure_running()  # its own start would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
