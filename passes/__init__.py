"""Passes: what moec does to a graph, in order. One idea a file; this tuple is registry, documentation and default."""

from moec.passes.canonical.canonicalize import Canonicalize
from moec.passes.capacity.infer import InferCapacity
from moec.passes.experts.find_experts import FindExperts
from moec.passes.experts.find_shared import FindShared
from moec.passes.experts.join_slots import JoinSlots
from moec.passes.routers.find_routers import FindRouters
from moec.pipeline import Pass

PASSES: tuple[Pass, ...] = (
    Canonicalize(),  # first: later passes compare values by name
    InferCapacity(),  # before experts: a capacity that is never exceeded is no part of a layer
    FindExperts(),  # before routers: a top-k is a router only by what its choice is used for
    JoinSlots(),  # after experts, before routers: columns that come together again are the router's choice
    FindRouters(),  # after experts, and only where neither gradients nor other readers keep the router apart
    FindShared(),  # last: it looks at what is added to a site's result
)
