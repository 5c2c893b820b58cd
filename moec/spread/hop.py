"""One hop of rows between the ranks of a process group: each row once to every rank that wants it, and sums back.

Rows travel as bytes, all that belongs to a row in one message (torch.distributed's all-to-all, gloo or NCCL).
Letters: N rows here, S rows sent, M rows received, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Hop:
    """Who sends what to whom.

    rows      i64[S]: the row of each sent copy, by destination, then by row
    copies    i64[N, c]: where a row's copies are among those sent, by destination; S where there are fewer than c
    sent      copies for each rank [R]        received  copies from each rank [R]
    most      choices of experts that a received copy carries at most
    """

    group: dist.ProcessGroup
    rows: Tensor
    copies: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    most: int

    @staticmethod
    def agree(group: dist.ProcessGroup, targets: Tensor, layer: str, asking: int) -> Hop:
        """targets i64[N, k]: the rank of each choice, -1 for none. `asking` is the same number on all ranks.

        Ranks tell each other three numbers: how many rows come, the most choices that one of them carries, `asking`.
        Raises RuntimeError where another rank is at another layer, or has other sizes.
        """
        ranks, (count, k) = group.size(), targets.shape
        at = torch.arange(count, device=targets.device).unsqueeze(1)
        wanted = targets >= 0
        keys, place = (targets * count + at)[wanted].unique(sorted=True, return_inverse=True)
        choices = place.bincount(minlength=1).max()
        to = keys // max(count, 1)
        copies = targets.new_full((count, k), keys.shape[0])
        copies[wanted] = place
        sent = torch.bincount(to, minlength=ranks)
        told = torch.stack([sent, choices.expand(ranks), torch.full_like(sent, asking)], dim=1)
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told, group=group)
        received, most, others = heard.t().tolist()
        strangers = [rank for rank, other in enumerate(others) if other != asking]
        if strangers:
            raise RuntimeError(
                f"moec: rows of {layer!r} cannot be exchanged: ranks {strangers} of {group.group_name!r} are at another"
                " layer or have other sizes; every rank must run the same model the same number of times"
            )
        each = _first_of_each(copies, min(k, ranks), keys.shape[0])
        return Hop(group, keys % max(count, 1), each, tuple(sent.tolist()), tuple(received), max(most))

    def there(self, *values: Tensor) -> list[Tensor]:
        """Each tensor [N, …] → its copies that other ranks sent here [M, …]."""
        arrived = self._carry([_bytes(v.index_select(0, self.rows)) for v in values], self.sent, self.received)
        return _parted(arrived, values)

    def back(self, *values: Tensor) -> list[Tensor]:
        """Each float tensor [M, …] → for each row the sum over its copies, in the order of ranks [N, …]."""
        arrived = self._carry([_bytes(v) for v in values], self.received, self.sent)
        return [self._summed(value) for value in _parted(arrived, values)]

    def _carry(self, parts: Sequence[Tensor], away: Sequence[int], home: Sequence[int]) -> Tensor:
        packed = torch.cat(list(parts), dim=1)
        arrived = packed.new_empty((sum(home), packed.shape[1]))
        dist.all_to_all_single(arrived, packed, list(home), list(away), group=self.group)
        return arrived

    def _summed(self, sent: Tensor) -> Tensor:
        """sent[S, …] → [N, …]; one copy a row and step, so that no two sums meet and their order is fixed."""
        wide = torch.float32 if sent.dtype in (torch.bfloat16, torch.float16) else sent.dtype
        total = sent.new_zeros((self.copies.shape[0], *sent.shape[1:]), dtype=wide)
        for column in self.copies.unbind(1):
            rows = (column < sent.shape[0]).nonzero().squeeze(1)
            total[rows] += sent[column[rows]]
        return total.to(sent.dtype)


def _first_of_each(copies: Tensor, most: int, none: int) -> Tensor:
    """copies[N, k], one for each choice → [N, most], each copy once, ascending; `none` fills up."""
    ordered = copies.sort(dim=1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(again, none).sort(dim=1).values[:, :most]


def _bytes(value: Tensor) -> Tensor:
    """[N, …] as u8[N, bytes of a row]."""
    return value.reshape(value.shape[0], _width(value)).contiguous().view(torch.uint8)


def _width(value: Tensor) -> int:
    """Numbers in one row."""
    return torch.Size(value.shape[1:]).numel()


def _parted(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of bytes put side by side."""
    parts = packed.split([_width(v) * v.element_size() for v in like], dim=1)
    return [
        part.clone(memory_format=torch.contiguous_format).view(v.dtype).reshape(packed.shape[0], *v.shape[1:])
        for part, v in zip(parts, like, strict=True)
    ]
