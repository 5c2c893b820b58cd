"""Scripts run as `python SCRIPT ARGUMENTS…` runs them, but in this process: torch is imported already."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


@dataclass(frozen=True)
class Ran:
    """How a script ended and what it printed."""

    code: int
    out: str
    err: str


def run_script(path: Path, *arguments: str) -> Ran:
    """Run it as `__main__`; the modules beside it that it imported are forgotten again."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    known, threads, random = set(sys.modules), torch.get_num_threads(), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.syspath_prepend(str(path.parent))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            err.write(end.code if isinstance(end.code, str) else "")
        finally:
            torch.set_num_threads(threads)
            torch.set_rng_state(random)
            for name in set(sys.modules) - known:
                if path.parent in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                    del sys.modules[name]
    return Ran(code, out.getvalue(), err.getvalue())
