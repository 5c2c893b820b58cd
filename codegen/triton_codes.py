"""How generated Triton reads a parameter: where it begins, and, where it is kept as codes, how they become products.

A scale that a whole row shares is applied to the sum; one of a part of a row, to each step's part of the sum, which
covers no more numbers than share it. So codes are multiplied exactly, and scales are applied in fp32.
"""

from __future__ import annotations

from typing import Any

from moec.ir.spec import ExpertsSpec

TYPES = {"f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16", "int8": "tl.int8", "fp8": "tl.uint8"}


def base(s: ExpertsSpec, group: str, kind: str) -> str:
    """Where expert e's part of a parameter begins; `kind` is the element type behind a table of addresses."""
    return f"{group} + e.to(tl.int64) * stride_{group}_e" if s.stacked else f"own({group}, e, {TYPES[kind]})"


def coded_context(s: ExpertsSpec) -> dict[str, Any]:
    """What the templates read to multiply by matrices of any storage."""
    c = s.coding
    scaled = c is not None and c.scaled

    def scale(at: str, group: str, axis: str, step: str = "") -> str:
        """The scales at `at`, of `step` where they differ along the sum, broadcast along `axis` of the product."""
        part = f" + {step} // {c.columns} * stride_scale_{group}_k" if c and c.columns else ""
        return f"tl.load({at}{part}){axis if c and c.rows else ''}"

    def scale_at(group: str, row: str) -> str:
        """Where the scales of the matrix rows `row` begin."""
        begin = base(s, f"scale_{group}", "f32")
        if not (c and c.rows):
            return begin
        whole = row if row.isidentifier() or row.startswith("(") else f"({row})"
        return f"{begin} + {whole}{f' // {c.rows}' if c.rows > 1 else ''} * stride_scale_{group}_n"

    def summed(acc: str, rows: str, weight: str, group: str, at: str, step: str) -> str:
        """`acc` and the product of `rows` and `weight`."""
        if c is None:
            return f"product({acc}, {rows}, {weight})"
        if not (scaled and c.columns):
            return f"product({acc}, {rows}, widened({weight}))"
        return f"scaled_product({acc}, {rows}, {weight}, {scale(at, group, '[None, :]', step)})"

    return {
        "c": c,
        "scaled": scaled,
        "scaled_by_step": scaled and c is not None and c.columns > 0,
        "scaled_at_end": scaled and c is not None and not c.columns,
        "scale": scale,
        "scale_at": scale_at,
        "summed": summed,
        "number_of": lambda text: f"widened({text}).to(tl.float32)" if c else f"{text}.to(tl.float32)",
    }
