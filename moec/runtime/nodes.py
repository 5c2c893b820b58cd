"""Memory nodes (NUMA): of which node a processor is, and on which one each expert's weights lie. Linux alone tells.

A thread that reads weights of its own node has their whole bandwidth; those of another node come through a link that
all share.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

from torch import Tensor

ONE = (1, 0, 0, 0)  # words of `Args` on a machine of one node
MOST = 8  # nodes that a kernel tells apart (NODES in moe.hpp); those beyond share its queues
_FOLDER = Path("/sys/devices/system/node")
_MOVE_PAGES = {"x86_64": 279, "aarch64": 239}  # numbers of the system call, which only asks where no nodes are given


@dataclass(frozen=True)
class Nodes:
    """The nodes that have processors, numbered from 0: how many, and of which one each processor is."""

    count: int
    of_cpu: array[int]
    numbers: tuple[int, ...]  # the system's own, in order


@lru_cache(maxsize=1)
def nodes() -> Nodes:
    """This machine's nodes."""
    return read_nodes(_FOLDER)


def read_nodes(folder: Path) -> Nodes:
    """The nodes that Linux describes in `folder`; one where it describes none."""
    cpus: dict[int, list[int]] = {}
    for path in folder.glob("node[0-9]*/cpulist"):
        listed = list(_listed(path.read_text()))
        if listed:
            cpus[int(path.parent.name[4:])] = listed
    if len(cpus) < 2:
        return Nodes(1, array("i"), tuple(cpus))
    of_cpu = array("i", [0]) * (1 + max(max(listed) for listed in cpus.values()))
    numbers = tuple(sorted(cpus))
    for i, number in enumerate(numbers):
        for cpu in cpus[number]:
            of_cpu[cpu] = i % MOST
    return Nodes(min(len(numbers), MOST), of_cpu, numbers)


def _listed(text: str) -> Iterable[int]:
    """The numbers of a list like `0-3,8`."""
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def words_of(matrices: Sequence[Sequence[Tensor]], alive: list[object]) -> tuple[int, ...]:
    """What `Args` says of nodes: their number, and two tables, which `alive` keeps.

    `matrices`: of each kind one tensor [E, …], or one of each expert. On a machine of one node nothing is asked.
    """
    here = nodes()
    if here.count < 2:
        return ONE
    spots = zip(*(_spots(tensors) for tensors in matrices), strict=True)
    table = array("i", node_of_each([tuple(chain(*some)) for some in spots], here))
    alive += (here.of_cpu, table)
    return (here.count, len(here.of_cpu), _address(here.of_cpu), _address(table))


def _spots(tensors: Sequence[Tensor]) -> Iterable[tuple[int, int]]:
    """Of each expert two addresses of a matrix: where it begins, and its middle."""
    if len(tensors) > 1:
        for t in tensors:
            yield t.data_ptr(), t.data_ptr() + t.numel() * t.element_size() // 2
        return
    whole = tensors[0]
    step = whole.stride(0) * whole.element_size()
    for e in range(whole.shape[0]):
        yield whole.data_ptr() + e * step, whole.data_ptr() + e * step + step // 2


def node_of_each(experts: Sequence[Sequence[int]], here: Nodes) -> list[int]:
    """The node on which most of each expert's addresses lie; in turn where that is not known."""
    flat = [address for addresses in experts for address in addresses]
    found = iter(where(flat))
    known = {number: i % MOST for i, number in enumerate(here.numbers)}
    each: list[int] = []
    for e, addresses in enumerate(experts):
        lies = Counter(known[n] for n in (next(found) for _ in addresses) if n in known)
        each.append(min(lies, key=lambda n: (-lies[n], n)) if lies else e % here.count)
    return each


def where(addresses: Sequence[int]) -> list[int]:
    """The system's number of the node of each address; below 0 where it is not known (not read yet, another system)."""
    number = _MOVE_PAGES.get(platform.machine())
    if number is None or not sys.platform.startswith("linux"):
        return [-1] * len(addresses)
    pages = (ctypes.c_void_p * len(addresses))(*addresses)
    status = (ctypes.c_int * len(addresses))(*[-1] * len(addresses))
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype, long = ctypes.c_long, ctypes.c_long
    call(long(number), long(0), ctypes.c_ulong(len(addresses)), pages, None, status, long(0))
    return list(status)  # as they were where the call is refused


def _address(table: array[int]) -> int:
    return table.buffer_info()[0]
