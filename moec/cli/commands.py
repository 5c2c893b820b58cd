"""The command line: every command of `moec`, exit codes, and one-line errors.

Exit codes: 0 the command's promise holds; 1 it does not (explain: a layer is not fused; verify: a result differs;
doctor: something is broken; demo: results differ; any unexpected error); 2 bad input, with one line on stderr; 130
stopped by Ctrl-C. `--debug` shows the traceback.
Commands import what they need when they run, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from moec.cli.bisect import bisect_command
from moec.cli.cache import cache_app
from moec.cli.capacity import DropRate, Loads, Tokens
from moec.cli.diff import diff_command
from moec.cli.exchange import Exchange, Place
from moec.cli.io import console as _console
from moec.cli.io import print_json as _print_json
from moec.cli.io import say as _say
from moec.cli.io import warnings_in_one_line
from moec.cli.kernels import kernels_command
from moec.cli.repro import repro_command
from moec.cli.routes import routes_command
from moec.cli.scan import scan_command
from moec.cli.tune import tune_command
from moec.cli.types import (
    BAD_INPUT,
    BROKEN_PROMISE,
    OK,
    STOPPED,
    Debug,
    Html,
    Json,
    NoGrad,
    OptionPairs,
    TargetArgument,
    report_of,
)
from moec.cli.verify import verify_command
from moec.errors import ModelError, MoecError, OptionError, TargetError
from moec.tools.typed import check_writable

app = typer.Typer(
    name="moec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"moec {importlib.metadata.version('moec')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """A compiler for Mixture-of-Experts layers in PyTorch: torch.compile(model, backend='moec').

    TARGET is file.py:callable or module:callable; the callable returns (model, args) or (model, args, kwargs).
    Exit codes: 0 yes, 1 no or a failure, 2 bad input, 130 stopped.
    """


def demo(
    tokens: Annotated[str, typer.Option(help="T, numbers of tokens to measure, separated by commas.")] = "1,8,64,512",
    dtype: Annotated[str, typer.Option(help="Weights and activations: bf16, f32 or f16.")] = "bf16",
    hidden: Annotated[int, typer.Option(help="H, the model's hidden size.")] = 2048,
    width: Annotated[int, typer.Option(help="F, an expert's width.")] = 768,
    experts: Annotated[int, typer.Option(help="E, the number of experts.")] = 64,
    top_k: Annotated[int, typer.Option(help="k, experts a token.")] = 8,
    budget: Annotated[
        float, typer.Option(help="Seconds of measuring; what is then left to compare with is skipped.")
    ] = 85.0,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Compile a real-sized MoE layer, check it, measure it beside eager and Inductor. Exit code 1: results differ."""
    from moec.demo.run import run_demo
    from moec.demo.view import show_demo
    from moec.tools.typed import demo_size

    size = demo_size(tokens, dtype, hidden, width, experts, top_k, budget)
    console = _console(stderr=json)
    result = run_demo(size, console)
    if json:
        print(result.to_json())
    else:
        show_demo(result, console)
    return OK if result.equal else BROKEN_PROMISE


def inspect(
    target: TargetArgument,
    passes: Annotated[bool, typer.Option("--passes", help="Show what each pass changed, as diffs.")] = False,
    source: Annotated[bool, typer.Option("--source", help="Show the source of the generated kernels.")] = False,
    ir: Annotated[bool, typer.Option("--ir/--no-ir", help="Show the IR of each layer.")] = True,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Show every region that may be an MoE layer, also the rejected.")
    ] = False,
    capacity: Annotated[
        bool, typer.Option("--capacity", help="Show bounds on rows and workspaces in terms of T, and what drops.")
    ] = False,
    tokens: Tokens = None,
    loads: Loads = None,
    drop_rate: DropRate = None,
    exchange: Exchange = None,
    place: Place = None,
    html: Html = None,
    options: OptionPairs = None,
    no_grad: NoGrad = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Compile a model and show what was found, its IR, what each pass did and the kernels' source."""
    from moec.cli.capacity import capacity_asked, loads_of
    from moec.cli.exchange import exchange_asked
    from moec.cli.show import inspect_data, inspect_view

    check_writable("--html", html)
    recorded = loads_of(loads, used=capacity or exchange is not None)
    asked = capacity_asked(capacity, tokens, recorded, drop_rate)
    spread = exchange_asked(exchange, recorded, place)
    report = report_of(target, options, no_grad, symbolic=asked is not None)
    if html is not None:
        _say(f"wrote {report.to_html(html)}")
    if json:
        extra = {"capacity": asked.data(report, options)} if asked else {}
        extra |= {"exchange": spread.data(report)} if spread else {}
        _print_json({**inspect_data(report, passes, source), **extra})
        return OK
    console = _console()
    for part in inspect_view(report, console.width, ir=ir, passes=passes, source=source, candidates=candidates):
        console.print(part, soft_wrap=isinstance(part, Text))
    if asked:
        console.print(asked.view(report, options))
    if spread:
        console.print(spread.view(report))
    return OK


def explain(
    target: TargetArgument,
    options: OptionPairs = None,
    no_grad: NoGrad = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Say which MoE layers are fused and why others are not.

    Exit code 0: every layer found is fused, in one graph. 1: one was declined, the graph broke, or nothing was found.
    """
    from moec.view.tables import report_view

    report = report_of(target, options, no_grad)
    if json:
        _print_json(report.to_dict(texts=False))
    else:
        console = _console()
        console.print(report_view(report, console.width))
    return OK if report.complete else BROKEN_PROMISE


def doctor(json: Json = False, debug: Debug = False) -> int:
    """Check this machine, from versions to a real kernel. Exit code 1: something is broken."""
    from moec.doctor.machine import checks, doctor_table

    console = _console(stderr=json)
    with console.status("building and running a small kernel"):
        results = checks()
    if json:
        _print_json({"ok": all(c.status != "broken" for c in results), "checks": [vars(c) for c in results]})
    else:
        console.print(doctor_table(results))
    return BROKEN_PROMISE if any(c.status == "broken" for c in results) else OK


COMMANDS = {
    "See": (
        ("demo", demo, "moec demo --hidden 64 --width 32 --experts 8 --top-k 2 --dtype f32 --budget 5"),
        ("doctor", doctor, "moec doctor"),
        ("explain", explain, "moec explain examples/01_compile.py:make --no-grad"),
        ("inspect", inspect, "moec inspect examples/01_compile.py:make --passes --html report.html"),
        ("verify", verify_command, "moec verify examples/01_compile.py:make"),
        ("scan", scan_command, "moec scan examples/01_compile.py --input 'f32[13, 64]'"),
        ("routes", routes_command, "moec routes examples/01_compile.py:make --out loads.jsonl"),
    ),
    "Make faster": (
        ("tune", tune_command, "moec tune examples/01_compile.py:make --budget 60"),
        ("kernels", kernels_command, "moec kernels examples/01_compile.py:make --target sm_90 --kernel gate_up"),
    ),
    "Find a fault": (
        ("diff", diff_command, "moec diff examples/01_compile.py:make --other rest=eager"),
        ("bisect", bisect_command, "moec bisect examples/01_compile.py:make --options rest=eager"),
        ("repro", repro_command, "moec repro examples/01_compile.py:make --out repro.py"),
    ),
}
"""The commands as `moec --help` lists them, each with an example."""

for _panel, _commands in COMMANDS.items():
    for _name, _command, _example in _commands:
        app.command(_name, rich_help_panel=_panel, epilog=f"Example: {escape(_example)}")(_command)
app.add_typer(cache_app, name="cache", rich_help_panel="Make faster")

# typer carries its own copy of click in new versions and uses the installed one in old ones: ask its own class.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Errors are one line on stderr."""
    debug = "--debug" in arguments
    try:
        with warnings_in_one_line():
            code = app(args=list(arguments), prog_name="moec", standalone_mode=False)
        if code == STOPPED:  # what typer may make of Ctrl-C
            return _fail("stopped", STOPPED)
        return code if isinstance(code, int) else OK
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped", STOPPED)
    except _UsageError as error:
        message = _usage_message(error, arguments)
        if not message:  # a command without its arguments, whose help has been shown
            return BAD_INPUT
        return _fail(f"{message} (moec --help lists commands, moec COMMAND --help their options)", BAD_INPUT)
    except (TargetError, OptionError, ModelError) as error:
        if debug:
            raise
        return _fail(str(error), BAD_INPUT)
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, MoecError) else f"{type(error).__name__}: "
        # torch appends paragraphs of advice about eager mode and its own logs.
        text = str(error).partition("\n\nSet TORCHDYNAMO_VERBOSE")[0].partition("\n  Hint: ")[0]
        return _fail(f"{kind}{text} (--debug shows where)", BROKEN_PROMISE)


def _usage_message(error: Exception, arguments: Sequence[str]) -> str:
    """What typer says of it, and the value that it leaves out where an option's is not of its type."""
    format_message: Any = getattr(error, "format_message", error.__str__)
    names: Sequence[str] = getattr(getattr(error, "param", None), "opts", ())
    words = [part for word in arguments for part in word.split("=", 1)]
    given = next((value for name, value in pairwise(words) if name in names), None)
    return format_message() + (f" (given: {given!r})" if given is not None else "")


def _fail(message: str, code: int) -> int:
    # One line whatever the message holds: scripts read it, and people read the first line.
    print(f"moec: error: {' '.join(message.split())}", file=sys.stderr)
    return code
