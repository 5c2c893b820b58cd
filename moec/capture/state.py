"""What capture knows of the compile that Dynamo is running now: whose it is, which loops are open, which gave up.

All of it lives on Dynamo's own objects (the output graph, the speculation log), so it ends with the compile.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from torch._C._functorch import peek_interpreter_stack
from torch._dynamo.exc import (
    RestartAnalysis,
    SkipFrame,
    TensorifyScalarRestartAnalysis,
    UnspecializeRestartAnalysis,
    Unsupported,
    UserError,
    UserErrorType,
)
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode


@dataclass(frozen=True)
class NotRolled:
    """A loop that stays as it was written, and why."""

    reason: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class RetraceUnrolled(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """Dynamo traces the frame again from its start; the two bases let it pass the backend and clear the log."""


def loop_key(file: str, line: int) -> str:
    """The name of a loop: where it stands."""
    return f"{file}:{line}"


def not_rolled(key: str, reason: str) -> NotRolled:
    """The decline of the loop named `key`."""
    file, _, line = key.rpartition(":")
    return NotRolled(reason, file, int(line))


def current_tx() -> Any:
    """The translator of the frame that is being traced in this thread, or None."""
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None


def transforming() -> bool:
    """Whether what is traced is inside torch.func's grad, vmap or jvp, where moec's operators cannot run."""
    return cast("object | None", peek_interpreter_stack()) is not None  # its declaration leaves None out


_INNER = ("_torchdynamo_orig_backend", "compiler_fn", "__wrapped__", "backend_compile_fn")
"""What wrappers call the backend that they wrap; the last is of the optimizer for DistributedDataParallel."""


def compiles_for_moec(tx: Any) -> bool:
    """Whether the backend behind this translator is moec's."""
    return backend_of(tx) is not None


def backend_of(tx: Any) -> Any:
    """The backend behind this translator, if it carries `__moec_backend__ = True`."""
    return next((fn for fn in behind(tx) if getattr(fn, "__moec_backend__", False) is True), None)


def behind(tx: Any) -> Iterator[Any]:
    """What is called with this translator's graph, and what that calls in turn, as far as torch's wrappers tell."""
    todo: list[Any] = [tx.output.compiler_fn]
    seen = set[int]()
    while todo:
        fn = todo.pop()
        if fn is None or id(fn) in seen:
            continue
        yield fn
        seen.add(id(fn))
        todo += [getattr(fn, name, None) for name in _INNER]
        if isinstance(fn, functools.partial):
            todo.append(fn.func)
        if isinstance(fn, types.MethodType):
            todo.append(fn.__self__)


class DecidedByData(UserError, GuardOnDataDependentSymNode):
    """A branch on a size that only data decides: Dynamo breaks the graph there, as it does at a branch on a tensor."""

    def __init__(self, cause: GuardOnDataDependentSymNode) -> None:
        super().__init__(UserErrorType.DYNAMIC_CONTROL_FLOW, str(cause))
        self.cond = cause.cond


def allow_data_dependence(tx: Any, numbers: bool = True) -> None:
    """Let this compile, and no other, trace outputs whose shape depends on data, and `numbers` moved to the host.

    Code that has nothing to do with a loop over experts may ask for the truth of such a shape; Dynamo would let that
    error through to the user, since without these settings it breaks the graph where the shape is made.
    """
    env = tx.output.shape_env
    if not hasattr(env, "moec_error"):
        env.moec_error = error = env._make_data_dependent_error
        env._make_data_dependent_error = lambda *args, **kwargs: DecidedByData(error(*args, **kwargs))
    scalars = numbers or env.settings.allow_scalar_outputs
    env.settings = dataclasses.replace(env.settings, allow_scalar_outputs=scalars, allow_dynamic_output_shape_ops=True)


def declined(tx: Any) -> dict[str, NotRolled]:
    """The loops that gave up in this compile, by key; kept over restarts of the analysis."""
    log = tx.speculation_log
    if not hasattr(log, "moec_not_rolled"):
        log.moec_not_rolled = {}
    return log.moec_not_rolled


@dataclass
class Loops:
    """The loops that one graph has rolled so far, in order, and the one whose body is being traced.

    handed: functions that hand numbers of the host to others, which stay symbols where loops cut rows by them
    asked: functions that ask for each expert's rows in a list
    counted: functions that count choices
    nested: those inside the graph of a higher-order operator (a checkpointed block), where no real loop can run.
    kind: the experts, from one on and before another, that the body is being traced for (`moec.capture.kinds`)
    """

    begun: list[str] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)
    handed: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    open: str | None = None
    kind: tuple[int, int] | None = None


def kinds_of(tx: Any) -> dict[str, tuple[tuple[int, int], ...]]:
    """The loops whose experts are of several kinds: for each, from which expert on and before which; over restarts."""
    log = tx.speculation_log
    if not hasattr(log, "moec_kinds"):
        log.moec_kinds = {}
    return log.moec_kinds


def retrace_by_kind(tx: Any, key: str, kinds: tuple[tuple[int, int], ...]) -> NoReturn:
    """Have Dynamo trace the frame again with the loop's body once for each kind of expert."""
    kinds_of(tx)[key] = kinds
    raise RetraceUnrolled(restart_reason=f"moec: loop at {key} has experts of {len(kinds)} kinds")


def loops_of(tx: Any) -> Loops:
    """The rolled loops of the graph that is being traced."""
    if not hasattr(tx.output, "moec_loops"):
        tx.output.moec_loops = Loops()
        tx.output.add_cleanup_hook(functools.partial(_retrace_failed, tx))
    return tx.output.moec_loops


def tell(tx: Any, loop: NotRolled) -> None:
    """Tell the backend of a loop that stays as it was written: Dynamo may find nothing to compile then."""
    listener = getattr(backend_of(tx), "not_rolled", None)
    if listener is not None:
        listener(loop)


def _retrace_failed(tx: Any) -> None:
    """Where tracing ends in an error, the loops that it may be due to are traced as they were written.

    A rolled body is traced even where the user's code would never have run it, and with shapes that are not known.
    """
    error, loops = sys.exc_info()[1], loops_of(tx)
    if error is None or isinstance(error, RestartAnalysis) or not isinstance(error, Exception):
        return
    if loops.open is not None:
        keys, reason = [loops.open], "its body cannot be traced for rows that it may never have"
    elif isinstance(error, (Unsupported, SkipFrame, UserError)):
        return  # Dynamo has an answer of its own
    else:
        keys = [*loops.begun, *loops.handed, *loops.asked, *loops.counted]
        reason = "what stands behind it cannot be traced"
    if not keys:
        return
    tx.speculation_log.clear()
    reason = f"{reason}: {_first_cause(error)}"
    retrace_all(tx, keys, reason)


def _first_cause(error: BaseException) -> str:
    """What went wrong at first, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def retrace_without(tx: Any, key: str, reason: str) -> NoReturn:
    """Give the loop up and have Dynamo trace the frame again with the loop as it was written."""
    tell(tx, declined(tx).setdefault(key, not_rolled(key, reason)))
    raise RetraceUnrolled(restart_reason=f"moec: loop at {key} not rolled: {reason}")


def retrace_all(tx: Any, keys: list[str], reason: str) -> NoReturn:
    """The same for several loops at once."""
    for key in keys[1:]:
        declined(tx).setdefault(key, not_rolled(key, reason))
    retrace_without(tx, keys[0], reason)
