"""Where cases of Triton kernels run: on the CPU in Triton's interpreter, or on a GPU (MOEC_TEST_DEVICE=cuda)."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

DEVICE = torch.device(os.environ.get("MOEC_TEST_DEVICE", "cpu"))


def moved(tensor: Tensor) -> Tensor:
    """On the device, with the strides that it has."""
    if tensor.device.type == DEVICE.type:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


class There:
    """Kernels, or one call, on that device: tensors go there, results come back."""

    def __init__(self, kernel):
        self._kernel = kernel

    def __call__(self, *args):
        return tree_map_only(Tensor, Tensor.cpu, self._kernel(*tree_map_only(Tensor, moved, args)))

    def __getattr__(self, name):
        found = getattr(self._kernel, name)
        return There(found) if name in ("experts", "moe") else found
