"""Graphs that `DistributedDataParallel` has cut: one with experts is asked for whole.

Dynamo hands a model inside DistributedDataParallel to an optimizer of its own, which cuts the graph where a bucket of
gradients is full and gives the backend the pieces. A cut knows nothing of layers: it parts experts from their router,
and a rolled loop from its body.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch.fx import Graph

from moec.capture.state import RetraceUnrolled, behind, current_tx


def ask_for_whole(can_hold_experts: Callable[[Graph], bool]) -> None:
    """Have Dynamo trace the frame again, into one bucket, where its graph was cut and may hold experts.

    To be called by the backend, inside its call by Dynamo, before anything else (the exception belongs to Dynamo: let
    it pass). Gradients are then reduced when those of the whole graph are there.
    """
    tx = current_tx()
    cutter = tx and next((each for each in behind(tx) if hasattr(each, "bucket_bytes_cap")), None)
    if cutter and len(getattr(cutter, "buckets", ())) > 1 and can_hold_experts(tx.output.graph):
        cutter.bucket_bytes_cap = cutter.first_bucket_cap = sys.maxsize  # it lives for this compile alone
        raise RetraceUnrolled(restart_reason="moec: a graph with experts is not cut at buckets of gradients")
