"""The ops of layers whose experts are spread over ranks: rows go to their experts and back around moec::experts.

Every rank holds all parameters and calls with its own tokens; the kernels that run are those of `spec` and `engine`, on
the rows that arrive. Each op is one node of a graph for any number of ranks. `exchange` is an Exchange's text.
Letters: T tokens of this rank, H hidden, E experts, k experts a token, M rows that arrive.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moec.codegen import twin
from moec.errors import CodegenError
from moec.exchange.process_groups import group_named
from moec.exchange.travel import Exchange
from moec.ir.dtypes import DTYPES
from moec.ir.engine import Engine
from moec.ir.spec import KernelSpec
from moec.runtime.fakes import experts_backward_fake, experts_fake
from moec.runtime.ops import Ops, by_input, no_second_gradient, register, wanted
from moec.spread.hop import Hop

_LIB = torch.library.Library("moec", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)  # how many rows come is known to the host only

_LIB.define(
    "route(Tensor x, Tensor[] router, int k, str spec) -> (Tensor logits, Tensor weights, Tensor experts)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "spread_experts(Tensor x, Tensor weights, Tensor experts, Tensor[] params, str spec, str engine, str exchange)"
    " -> Tensor",
    tags=_TAGS,
)
_LIB.define(
    "spread_experts_backward(Tensor grad, Tensor x, Tensor weights, Tensor experts, Tensor[] params, str spec,"
    " str engine, str exchange, bool[] needs) -> (Tensor, Tensor, Tensor[])",
    tags=_TAGS,
)


def _route(x: Tensor, router: Sequence[Tensor], k: int, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    """The router of a spec on this rank's tokens: eager's own choices."""
    parsed = KernelSpec.parse(spec)
    if parsed.router is None:
        raise CodegenError(f"moec::route needs a spec with a router, got {spec!r}")
    return twin.route(x, router, k, parsed.router)


def _route_fake(x: Tensor, router: Sequence[Tensor], k: int, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    parsed = KernelSpec.parse(spec)
    assert parsed.router is not None
    return (
        x.new_empty((x.shape[0], router[0].shape[0]), dtype=DTYPES[parsed.router.compute]),
        x.new_empty((x.shape[0], k), dtype=DTYPES[parsed.router.weight_dtype]),
        x.new_empty((x.shape[0], k), dtype=torch.int64),
    )


class _Arrived:
    """Rows on the ranks of their experts: `values` [M, …], the choices of this rank's experts and their weights [M, c].

    c is the most choices that one of these rows has here; a choice of no expert is -1.
    """

    def __init__(
        self, exchange: Exchange, weights: Tensor, experts: Tensor, values: Sequence[Tensor], asking: str
    ) -> None:
        group = group_named(exchange.group)
        here, ids = group.rank(), experts.masked_fill(_strange(experts, exchange), -1)
        self.hops: list[Hop] = []
        self.values = list(values)
        for hop, target in enumerate(exchange.targets(here)):
            ranks = _at(target, ids)
            word = zlib.crc32(f"{exchange} {hop} {asking} {ids.shape[1]}".encode())
            self.hops.append(Hop.agree(group, ranks, exchange.layer, word))
            *self.values, weights, sent = self.hops[-1].there(*self.values, weights, ids.to(torch.int32))
            ids = sent.long()
            ids = ids.masked_fill(_at(target, ids) != here, -1)
        first = (ids < 0).to(torch.int8).sort(dim=1, stable=True).indices
        self.slots = first[:, : max(self.hops[-1].most, 1)]  # its choices are the first of each row
        self.columns = ids.shape[1]
        self.weights, self.experts = weights.gather(1, self.slots), ids.gather(1, self.slots)

    def home(self, *values: Tensor) -> list[Tensor]:
        """What each row's ranks made of it [M, …] → the sum for each token [T, …]."""
        found = list(values)
        for hop in reversed(self.hops):
            found = hop.back(*found)
        return found

    def all_slots(self, per_slot: Tensor) -> Tensor:
        """[M, c] → [M, k], zeros where a choice is not of this rank."""
        return per_slot.new_zeros((per_slot.shape[0], self.columns)).scatter(1, self.slots, per_slot)


def _strange(experts: Tensor, exchange: Exchange) -> Tensor:
    """Where a choice names no expert."""
    return (experts < 0) | (experts >= exchange.placement.experts)


def _at(target: tuple[int, ...], ids: Tensor) -> Tensor:
    """The rank of each choice, -1 of none."""
    ranks = _table(target, ids.device)
    return ranks[ids]  # the last entry, -1, is that of expert -1


@lru_cache(maxsize=256)
def _table(target: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((*target, -1), device=device)


def _local(engine: str) -> str:
    """How kernels run on what arrives: bounds on this rank's own tokens say nothing of it."""
    return str(replace(Engine.parse(engine), tokens="", capacity=""))


def _sizes(x: Tensor, weights: Tensor, params: Sequence[Tensor], spec: str) -> str:
    """What decides how many bytes a row has, and which layer it is of."""
    return f"{spec} {x.shape[1]} {x.dtype} {weights.dtype} {tuple(params[0].shape)}"


def _spread_experts(
    x: Tensor, weights: Tensor, experts: Tensor, params: Sequence[Tensor], spec: str, engine: str, exchange: str
) -> Tensor:
    arrived = _Arrived(Exchange.parse(exchange), weights, experts, [x], _sizes(x, weights, params, spec))
    (rows,) = arrived.values
    y = torch.ops.moec.experts(rows, arrived.weights, arrived.experts, params, spec, _local(engine))
    return arrived.home(y)[0]


def _spread_fake(*args: Any) -> Tensor:
    """As moec::experts without the exchange."""
    return experts_fake(*args[:-1])


def _spread_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    params: Sequence[Tensor],
    spec: str,
    engine: str,
    exchange: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    asking = f"backward {list(needs)} {_sizes(x, weights, params, spec)}"
    arrived = _Arrived(Exchange.parse(exchange), weights, experts, [x, grad], asking)
    rows, grads = arrived.values
    dx, dweights, dparams = torch.ops.moec.experts_backward(
        grads, rows, arrived.weights, arrived.experts, params, rows.new_empty(0), spec, _local(engine), needs
    )
    made = [dx] if needs[0] else []
    made += [arrived.all_slots(dweights)] if needs[1] else []
    found = arrived.home(*made) if made else []
    return (
        found.pop(0) if needs[0] else x.new_empty(0),
        found.pop(0) if needs[1] else weights.new_empty(0),
        dparams,
    )


def _spread_backward_fake(
    grad: Tensor, x: Tensor, weights: Tensor, experts: Tensor, params: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As moec::experts_backward that is given nothing of the forward, without the exchange."""
    spec, engine, _, needs = rest
    return experts_backward_fake(grad, x, weights, experts, params, x, spec, engine, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, experts, params, *texts = inputs
    ctx.texts, ctx.count = texts, len(params)
    ctx.save_for_backward(x, weights, experts, *params)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weights, experts, *params = ctx.saved_tensors
    needs = wanted(ctx)
    found = torch.ops.moec.spread_experts_backward(grad, x, weights, experts, params, *ctx.texts, needs)
    return by_input(ctx, needs, *found)


_OPS: Ops = (
    ("route", _route, _route_fake),
    ("spread_experts", _spread_experts, _spread_fake),
    ("spread_experts_backward", _spread_backward, _spread_backward_fake),
)
register(_LIB, _OPS)
torch.library.register_autograd("moec::spread_experts_backward", no_second_gradient, lib=_LIB)
torch.library.register_autograd("moec::spread_experts", _backward, setup_context=_save, lib=_LIB)
