"""LocMoE's locality loss: draws a rank's tokens to experts that are near. It changes the model: the user adds it.

"LocMoE: A Low-overhead MoE for Large Language Model Training" (arXiv 2401.13920): L_loc = μ·KL(D_c ‖ D_l), beside the
task's loss and the load-balancing loss, with D_c the distribution of a device's current batch over experts and D_l
the fully local one. D_l is zero at the other experts, where KL is infinite; here they share ε of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.errors import OptionError
from moec.exchange.placement import Placement


def local_distribution(placement: Placement, rank: int, smoothing: float) -> Tensor:
    """D_l f32[E]: 1 - smoothing even over the experts of `rank`, smoothing even over the others.

    Even over all where all are its own. Raises OptionError for a rank without experts or smoothing outside (0, 1).
    """
    if not 0 < smoothing < 1:
        raise OptionError(f"smoothing={smoothing}: expected more than 0 (where KL is infinite) and less than 1")
    local = torch.tensor([owner == rank for owner in placement.owners])
    near, far = int(local.sum()), int((~local).sum())
    if not near:
        raise OptionError(f"rank {rank} of {placement.ranks} has no experts to be near to; place by nodes (`of_nodes`)")
    if not far:
        return torch.full((near,), 1 / near)
    return torch.where(local, (1 - smoothing) / near, smoothing / far)


def locality_loss(
    probabilities: Tensor, placement: Placement, rank: int, *, mu: float, smoothing: float = 0.1
) -> Tensor:
    """μ·KL(D_c ‖ D_l), a scalar in fp32 or fp64; 0 for a batch without tokens.

    probabilities[…, E] are the router's, summing to 1 over E; D_c is their mean over tokens. `rank` is where the tokens
    are. For locality in nodes give `placement.of_nodes(size)` and the node's number. smoothing is ε.
    """
    if probabilities.shape[-1] != placement.experts:
        raise OptionError(f"probabilities of {probabilities.shape[-1]} experts, a placement of {placement.experts}")
    wide = torch.promote_types(probabilities.dtype, torch.float32)
    rows = probabilities.to(wide).reshape(-1, placement.experts)
    if not rows.shape[0]:
        return rows.sum()
    current = rows.mean(0)
    local = local_distribution(placement, rank, smoothing).to(rows)
    least = torch.finfo(wide).tiny  # of an expert that nobody can choose: its term is 0, with a finite slope
    return mu * (current * (current.clamp_min(least).log() - local.log())).sum()
