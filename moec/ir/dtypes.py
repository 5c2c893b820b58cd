"""Dtypes and their names: in specs, in graphs, and as Triton says them. An element's bytes are torch's `itemsize`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""What kernels compute in."""
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

STORED: Mapping[str, torch.dtype] = {**DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What a parameter may be stored in."""
BUFFERS: Mapping[str, torch.dtype] = {**STORED, "i32": torch.int32, "i64": torch.int64}
"""What a GPU kernel's tensors and buffers may hold."""

GRAPH_DTYPES: Mapping[str, torch.dtype] = {
    **DTYPES,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
"""What values of a graph have; a dtype that is not here is said as torch says it."""
GRAPH_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in GRAPH_DTYPES.items()}

TRITON: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8e4nv": torch.float8_e4m3fn,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
}
"""The element types of pointers in a Triton kernel's signature."""
