"""A matrix as codes and scales, and back, in plain torch (see `moec.ir.coding`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moec.ir.coding import LARGEST, Coding
from moec.ir.dtypes import STORED


def encoded(matrix: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """matrix[N, K] in fp32 → codes[N, K] and scales in fp32.

    Symmetric: the largest magnitude of a block is the largest code times its scale, zero stays zero. A number that is
    not finite makes its block NaN.
    """
    dtype = STORED[coding.element]
    if not coding.scaled:
        return matrix.to(dtype), matrix.new_ones(1, 1)
    scales = _blocks(matrix.abs(), coding).amax((1, 3)) / LARGEST[coding.element]
    numbers = matrix / spread(scales.where(scales != 0, 1.0), coding, matrix.shape)
    return (numbers.round() if coding.element == "int8" else numbers).to(dtype), scales


def decoded(codes: Tensor, scales: Tensor, coding: Coding) -> Tensor:
    """The matrix [N, K] that codes and scales stand for, in fp32; in fp64 where either is."""
    dtype = torch.float64 if torch.float64 in (codes.dtype, scales.dtype) else torch.float32
    wide = codes.to(dtype)
    return wide * spread(scales.to(dtype), coding, codes.shape) if coding.scaled else wide


def spread(scales: Tensor, coding: Coding, shape: Sequence[int]) -> Tensor:
    """The scale of each number of a matrix of `shape`."""
    rows, columns = coding.rows or shape[0], coding.columns or shape[1]
    wide = scales.repeat_interleave(rows, 0)[: shape[0]]
    return wide.repeat_interleave(columns, 1)[:, : shape[1]]


def _blocks(matrix: Tensor, coding: Coding) -> Tensor:
    """matrix[N, K] as blocks[⌈N/rows⌉, rows, ⌈K/columns⌉, columns], zeros where the last ones are not full."""
    rows, columns = coding.rows or matrix.shape[0], coding.columns or matrix.shape[1]
    up, across = coding.scale_shape(*matrix.shape)
    padded = torch.nn.functional.pad(matrix, (0, across * columns - matrix.shape[1], 0, up * rows - matrix.shape[0]))
    return padded.view(up, rows, across, columns)
