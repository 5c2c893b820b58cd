"""The sizes of a found layer, whether its tokens come flat or in batches."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from test_handwritten import WIDTH, E, H, K, WhereLoop

import moec
from moec.codegen.tuning import Sizes
from moec.errors import TargetError
from moec.sizing.site_sizes import sizes_of


@pytest.fixture(scope="module", params=[(13, H), (2, 5, H)], ids=["flat", "batched"])
def found(request):
    with torch.no_grad():
        report = moec.explain(WhereLoop(), torch.randn(*request.param), moec_options={"rest": "eager"})
    (site,) = report.sites
    return site, torch.Size(request.param[:-1]).numel()


def test_sizes_are_those_of_the_model(found):
    site, tokens = found
    assert sizes_of(site) == Sizes(tokens, H, WIDTH, E, K)
    assert sizes_of(site, 7).T == 7


def test_a_size_that_is_no_number_is_an_error(found):
    site, _ = found
    loose = replace(site, ir=re.sub(rf"\b{WIDTH}\b", "s0", site.ir))
    assert loose.ir != site.ir
    with pytest.raises(TargetError, match="F is s0, expected a number"):
        sizes_of(loose)
