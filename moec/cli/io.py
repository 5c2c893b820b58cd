"""How commands print: a console, JSON on stdout, warnings as one line."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

PIPED_WIDTH = 120


def console(stderr: bool = False) -> Console:
    """A console as wide as the window; a fixed width where nobody looks through one."""
    piped = not (sys.stderr if stderr else sys.stdout).isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, width=PIPED_WIDTH if piped else None, highlight=False, emoji=False, soft_wrap=False)


def say(text: str, stderr: bool = True) -> None:
    """One line that is never cut, so that a path in it can be copied."""
    console(stderr).print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


@contextmanager
def warnings_in_one_line() -> Generator[None]:
    """What moec warns of is shown without the line of its source that says so; other warnings as Python shows them."""
    usual = warnings.formatwarning

    def shown(message: Warning | str, *place: Any, **more: Any) -> str:
        text = " ".join(str(message).split())
        own = text.startswith(_OWN)
        return f"moec: warning: {text.removeprefix(_OWN)}\n" if own else usual(message, *place, **more)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = usual


_OWN = "moec: "
