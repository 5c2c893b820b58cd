"""Experts whose matrices are kept as codes or in another dtype, and made into numbers where they are used."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, Spelling, tokens
from spellings_strangers import Chosen
from torch import nn


class Kept(Chosen):
    """A hit loop over codes; how a matrix is made of them differs."""

    codes = torch.int8

    def __init__(self):
        super().__init__()
        del self.experts
        for name, shape in (("up", (WIDTH, H)), ("down", (H, WIDTH))):
            numbers = torch.randint(-100, 100, (E, *shape))
            self.register_buffer(name, numbers.to(self.codes))
            self.register_buffer(f"{name}_scale", torch.rand(E, *self.scales(*shape)) * 0.004 + 0.001)

    def scales(self, rows, columns):
        return rows, 1

    def matrix(self, codes, scale, dtype):
        return codes.to(dtype) * scale

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            if token.numel() == 0:
                continue
            h = F.silu(F.linear(x[token], self.matrix(self.up[e], self.up_scale[e], x.dtype)))
            out = F.linear(h, self.matrix(self.down[e], self.down_scale[e], x.dtype))
            y.index_add_(0, token, out * w[token, slot, None])
        return y


class RowScales(Kept):
    """int8, a scale a row."""


class OneScale(Kept):
    """fp8, one scale a matrix."""

    codes = torch.float8_e4m3fn

    def scales(self, rows, columns):
        return ()


class FlatScales(Kept):
    """int8, scales without an axis of columns."""

    def scales(self, rows, columns):
        return (rows,)

    def matrix(self, codes, scale, dtype):
        return codes.to(dtype) * scale.unsqueeze(-1)


class BlockScales(Kept):
    """fp8 in blocks of 8 × 8."""

    codes = torch.float8_e4m3fn

    def scales(self, rows, columns):
        return rows // 8, columns // 8

    def matrix(self, codes, scale, dtype):
        return codes.to(dtype) * scale.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)


class HalfInFull(Kept):
    """bf16 matrices, used in the dtype of x."""

    codes = torch.bfloat16

    def matrix(self, codes, scale, dtype):
        return codes.to(dtype)


class CodedLinear(nn.Module):
    """A layer kept as int8 with a scale a row, and a bias in bf16."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.register_buffer("weight", torch.randint(-100, 100, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.rand(outputs) * 0.004 + 0.001)
        self.register_buffer("bias", torch.randn(outputs).bfloat16())

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale[:, None], self.bias.to(x.dtype))


class CodedModules(Chosen):
    """Experts are modules of layers that are kept as codes."""

    @staticmethod
    def expert():
        return nn.Sequential(CodedLinear(H, WIDTH), nn.GELU(), CodedLinear(WIDTH, H))

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = chosen == e
            token, slot = torch.where(mask)
            y.index_add_(0, token, expert(x[token]) * w[token, slot].unsqueeze(-1))
        return y


class FullInHalf(Chosen):
    """fp32 parameters, cast to bf16 where they are used."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.up, self.down = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2), nn.Parameter(torch.randn(E, WIDTH, H) * 0.2)

    def forward(self, x):
        w, chosen = self.choose(x)
        rows = x.bfloat16()
        y = torch.zeros_like(rows)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            h = F.relu(rows[token] @ self.up[e].to(rows.dtype)) @ self.down[e].to(rows.dtype)
            y.index_add_(0, token, h * w[token, slot, None].to(h.dtype))
        return y.float()


class ColumnScales(Kept):
    """A scale a column of one matrix and a row of the other: no kind of codes says both."""

    def scales(self, rows, columns):
        return (rows, 1) if rows == WIDTH else (1, columns)


class LearnedScales(Kept):
    """Scales that are trained."""

    def __init__(self):
        super().__init__()
        for name in ("up_scale", "down_scale"):
            value = getattr(self, name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(value))


class HalfTrained(HalfInFull):
    """The same as parameters."""

    def __init__(self):
        super().__init__()
        for name in ("up", "down"):
            value = getattr(self, name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(value / 100))


class Shifted(Kept):
    """Codes with a zero point."""

    def matrix(self, codes, scale, dtype):
        return (codes.to(dtype) - 3.0) * scale


SPELLINGS = tuple(
    Spelling(kind.__name__, "P2", kind, tokens)
    for kind in (RowScales, OneScale, FlatScales, BlockScales, HalfInFull, CodedModules)
)

NEAR = (ColumnScales, LearnedScales, Shifted)
