"""Small instructions as torch functions: what each makes of its operands."""

from __future__ import annotations

import pytest
import torch

from moec.passes.lowering.lower_words import first_of_each


def expected(choice, most, experts, by_slot):
    """One pair after the other."""
    out, taken = torch.full_like(choice, -1), [0] * experts
    tokens, slots = choice.shape
    pairs = [(t, s) for s in range(slots) for t in range(tokens)] if by_slot else None
    for t, s in pairs or [(t, s) for t in range(tokens) for s in range(slots)]:
        e = int(choice[t, s])
        if 0 <= e < experts and taken[e] < most:
            taken[e] += 1
            out[t, s] = e
    return out


@pytest.mark.parametrize("by_slot", [False, True])
@pytest.mark.parametrize("most", [0, 1, 3, 100])
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (13, 1), (13, 3), (200, 2)])
def test_the_first_of_each_expert_are_kept(shape, most, by_slot):
    torch.manual_seed(0)
    choice = torch.randint(-1, 6, shape)  # −1 and 5 are no experts
    assert torch.equal(first_of_each(choice, most, 5, by_slot), expected(choice, most, 5, by_slot))
