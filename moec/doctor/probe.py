"""The doctor's probe, run in a process of its own: a small MoE layer, compiled, run and compared with eager."""

from __future__ import annotations

import json
import time
import warnings

import torch

from moec.backend import explain
from moec.demo.forms import make_moe
from moec.report import Report


def main() -> None:
    """Print one line of JSON: ok, and what was found."""
    torch.manual_seed(0)
    model = make_moe(hidden=64, width=48, experts=8, top_k=2, dtype=torch.float32)
    x = torch.randn(13, 64)
    start = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = explain(model, x)
        compiled = torch.compile(model, backend="moec")
        error = float((compiled(x) - model(x)).abs().max())
    print(json.dumps(_verdict(report, error, time.perf_counter() - start, [str(w.message) for w in caught])))


def _verdict(report: Report, error: float, seconds: float, warned: list[str]) -> dict[str, object]:
    if not report.complete:
        reasons = [str(reason) for site in report.sites for reason in site.reasons] or [repr(report)]
        return {"ok": False, "found": f"the layer was not fused: {reasons[0]}"}
    fallback = [text for text in warned if text.startswith("moec:")]
    if fallback:
        return {"ok": False, "found": fallback[0]}
    if not error < 1e-4:
        return {"ok": False, "found": f"result differs from eager by {error:.2g}"}
    kernels = ", ".join(report.sites[0].kernels)
    return {"ok": True, "found": f"{kernels} built and run in {seconds:.1f} s, off eager by {error:.1g}"}
