"""`moec verify TARGET`: every rewrite tried at length on the user's model, and the whole model against eager."""

from __future__ import annotations

from moec.cli.io import console, print_json
from moec.cli.types import BROKEN_PROMISE, OK, Debug, Json, NoGrad, OptionPairs, TargetArgument
from moec.tools.typed import parse_options


def verify_command(
    target: TargetArgument,
    options: OptionPairs = None,
    no_grad: NoGrad = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Try every rewrite of a model at length, and the whole model against eager.

    Exit code 0: something is fused, and all of it gives the same results. 1: it does not, or nothing is fused.
    """
    import torch

    from moec.tools.loading import load
    from moec.tools.proving import verify_model
    from moec.tools.proving_view import verification_view

    values, loaded = parse_options(options or []), load(target)
    waiting = console(stderr=True).status(f"compiling {target}")
    with waiting, torch.set_grad_enabled(not no_grad):
        found = verify_model(
            loaded.model, loaded.args, loaded.kwargs, values, lambda name: waiting.update(f"trying {name}")
        )
    if json:
        print_json(found.to_dict())
    else:
        shown = console()
        for part in verification_view(found):
            shown.print(part)
    return OK if found.holds else BROKEN_PROMISE
