"""What `moec tune` measures: a layer at one number of tokens, and how its tokens are spread over experts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moec.codegen.tuning import Sizes
from moec.errors import OptionError

_LIMITS = {"f32": 1e-5, "bf16": 2e-2, "f16": 4e-3}  # relative error to the reference that a winner may have

ROUTINGS = 8
"""Different choices of experts in turn, or few tokens would find their weights in cache."""


@dataclass(frozen=True)
class Job:
    """What is tuned: a layer at one number of tokens, with `threads` threads and routing by `profile`.

    `weights` is how its kernels store them, as in the option of that name; `device` is a GPU, empty: the CPU.
    """

    spec: str
    sizes: Sizes
    threads: int
    profile: str = "uniform"
    weights: str = "stored"
    device: str = ""


def shares(profile: str, experts: int) -> Tensor:
    """Each expert's share[E] of the tokens: `uniform`, `zipf` or `zipf:1.2`, or a JSON file with a list of E counts.

    Raises OptionError where the profile is none of these.
    """
    name, _, exponent = profile.partition(":")
    if profile == "uniform":
        return torch.full((experts,), 1.0 / experts)
    if name == "zipf":
        try:
            weights = torch.arange(1, experts + 1).double() ** -float(exponent or 1.2)
        except ValueError:
            raise OptionError(f"profile {profile!r}: expected a number after zipf, such as zipf:1.2") from None
        return (weights / weights.sum()).float()
    try:
        counts = torch.tensor(json.loads(Path(profile).read_text()), dtype=torch.float64)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        known = "expected uniform, zipf, zipf:1.2 or a JSON file with a list of counts"
        raise OptionError(f"profile {profile!r}: {known} ({error})") from error
    if counts.shape != (experts,) or not bool((counts >= 0).all()) or not float(counts.sum()) > 0:
        raise OptionError(f"profile {profile!r} has shape {list(counts.shape)}; expected {experts} counts, one above 0")
    return (counts / counts.sum()).float()


def profile_name(profile: str, experts: int) -> str:
    """The profile as results name it; a file's counts are part of the name, since the file may change."""
    share = shares(profile, experts)
    if profile.partition(":")[0] in ("uniform", "zipf"):
        return profile
    return f"{Path(profile).stem}-{hashlib.sha256(str(share.tolist()).encode()).hexdigest()[:8]}"


def routing(job: Job, seed: int) -> Tensor:
    """experts[T, k]: distinct experts for each token, drawn by the profile's shares."""
    s = job.sizes
    generator = torch.Generator().manual_seed(seed)
    noise = -torch.log(-torch.log(torch.rand(s.T, s.E, generator=generator).clamp(1e-9, 1 - 1e-7)))
    return (shares(job.profile, s.E).clamp(min=1e-12).log() + noise).topk(s.k).indices


def wrong_by(got: Tensor, want: Tensor, dtype: str) -> str:
    """What is wrong with a candidate's y beside the reference's, both of kernels in `dtype`; empty: nothing."""
    error = float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30))
    limit = _LIMITS[dtype]
    return "" if error <= limit else f"relative error {error:.2g} to the reference, expected at most {limit:g}"
