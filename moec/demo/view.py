"""The demo's result as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moec.compare.view import plain_table, times_table
from moec.compare.ways import MOEC, empty_cells
from moec.demo.run import ALTERNATIVES, DemoResult
from moec.view.tables import report_view


def show_demo(result: DemoResult, console: Console) -> None:
    """Print it: what was found, whether it is right, how fast it is."""
    size, ceilings = result.size, result.ceilings
    console.print(Text(result.environment, "dim"))
    console.print(f"one MoE layer in {size.dtype}: H={size.hidden} F={size.width} E={size.experts} k={size.top_k}\n")
    console.print(report_view(result.report, console.width))
    console.print(f"first call, with capture, kernels and Inductor: {result.compile_seconds:.1f} s")
    console.print(_checks(result))
    names = [MOEC, *(name for name, _, _ in ALTERNATIVES)]
    console.print(times_table("\nHow fast?", result.rows, names))
    limits = f"limits measured in this run: reading {ceilings.read:.1f} GB/s, products {ceilings.gemm:.0f} GFLOP/s"
    console.print(Text(f"{limits}; {size.dtype} products in torch {ceilings.native:.1f} GFLOP/s", "dim"))
    for line in empty_cells(result.rows):
        console.print(Text(line, "dim"))


def _checks(result: DemoResult) -> Table:
    table = plain_table("\nIs it right? (relative error against an fp32 reference)")
    for name in ("tokens", "moec", "eager", "allowed", "same experts as eager", ""):
        table.add_column(name, justify="left" if not name else "right")
    for c in result.checked:
        eager = "too slow here" if c.eager_error is None else f"{c.eager_error:.1e}"
        chosen = f"{c.same_choice}/{c.tokens}" + (f" ({c.ties} rounding ties)" if c.ties else "")
        verdict = Text("equal", "green") if c.equal else Text("DIFFERENT", "bold red")
        table.add_row(str(c.tokens), f"{c.error:.1e}", eager, f"{c.tolerance:.0e}", chosen, verdict)
    return table
