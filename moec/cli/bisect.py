"""`moec bisect TARGET`: the rewrite that changes the answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.io import console, print_json
from moec.cli.types import BROKEN_PROMISE, OK, Debug, Json, OptionPairs, TargetArgument
from moec.errors import OptionError
from moec.tools.typed import parse_options

if TYPE_CHECKING:
    from moec.tools.blame import Verdict


def bisect_command(
    target: TargetArgument,
    grad: Annotated[bool, typer.Option("--grad", help="Compare gradients too.")] = False,
    tolerance: Annotated[
        float, typer.Option(help="Times what is allowed for a dtype (relative: 1e-4 f32, 1e-2 f16, 4e-2 bf16).")
    ] = 1.0,
    options: OptionPairs = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Find the rewrite that changes a model's answer, by limiting how many are made (rewrite fuel).

    Exit code 0: the compiled model agrees with eager. 1: it does not, and the first rewrite at fault is named.
    """
    from moec.options import Options
    from moec.tools.blame import find_culprit
    from moec.tools.loading import load

    if not 0 < tolerance < math.inf:
        raise OptionError(f"--tolerance {tolerance:g} is not a positive number; for example --tolerance 10")
    wanted = Options.make(parse_options(options or []))
    loaded = load(target)
    screen = console(stderr=True)
    with screen.status(f"compiling {target}") as status:
        verdict = find_culprit(
            loaded, wanted, grad, tolerance, lambda t: status.update(f"{t.rewrites} rewrites: {_error(t.error)}")
        )
    if json:
        print_json(
            {
                "rewrites": verdict.rewrites,
                "culprit": verdict.culprit,
                "name": verdict.name,
                "tried": [{"rewrites": t.rewrites, "error": t.error, "wrong": t.wrong} for t in verdict.tried],
            }
        )
    else:
        for line in _lines(verdict):
            console().print(line, highlight=False, markup=False)
    return OK if verdict.culprit is None else BROKEN_PROMISE


def _error(error: float) -> str:
    return f"{error:.2g} of what is allowed"


def _lines(verdict: Verdict) -> list[str]:
    tried = [f"  {t.rewrites} rewrites: {_error(t.error)}{'  ← wrong' if t.wrong else ''}" for t in verdict.tried]
    if verdict.culprit is None:
        return [f"the answer is eager's with all {len(verdict.rewrites)} rewrites", *tried]
    if verdict.culprit == 0:
        head = "the answer differs without any rewrite: try --options rest=eager, or a model that is deterministic"
        return [head, *tried]
    head = f"rewrite {verdict.culprit} of {len(verdict.rewrites)} changes the answer: {verdict.name}"
    advice = f"without it: torch.compile(model, backend='moec', options={{'fuel': {verdict.culprit - 1}}})"
    return [head, *tried, advice]
