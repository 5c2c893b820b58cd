"""What Dynamo did not trace since a mark: where it broke a graph, and the functions that it left to Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.utils import CompilationMetrics, get_compilation_metrics

_OWN = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Mark:
    """How much Dynamo had recorded at one moment."""

    breaks: int
    last: CompilationMetrics | None

    @staticmethod
    def now() -> Mark:
        """What is recorded from here on is new."""
        compiles = get_compilation_metrics()
        return Mark(len(torch._dynamo.utils.graph_break_reasons), compiles[-1] if compiles else None)

    def breaks_since(self) -> list[tuple[str, str]]:
        """(reason, file:line) of each break and of each function that was given up, which runs in eager mode."""
        found: list[tuple[str, str]] = []
        for broken in torch._dynamo.utils.graph_break_reasons[self.breaks :]:
            frame = broken.user_stack[-1] if broken.user_stack else None
            found.append((str(broken.reason), f"{frame.filename}:{frame.lineno}" if frame else ""))
        return [*found, *(_given_up(one) for one in self._new() if one.fail_type and not _own(one))]

    def _new(self) -> list[CompilationMetrics]:
        """The compiles since, in order; Dynamo forgets the oldest ones."""
        new: list[CompilationMetrics] = []
        for one in reversed(get_compilation_metrics()):
            if one is self.last:
                break
            new.append(one)
        return new[::-1]


def _own(one: CompilationMetrics) -> bool:
    return (one.co_filename or "").startswith(_OWN)


def _given_up(one: CompilationMetrics) -> tuple[str, str]:
    why = (one.fail_reason or one.fail_type or "").strip()
    file, line = one.fail_user_frame_filename, one.fail_user_frame_lineno
    if file is None or line is None:
        file, line = one.co_filename, one.co_firstlineno
    return f"{one.co_name} is not compiled as a whole and runs in eager mode: {why}", f"{file}:{line}"
