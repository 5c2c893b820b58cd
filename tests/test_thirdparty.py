"""Other people's MoE modules, unmodified, from PyPI: fused and equal, or declined with a reason to act on.

Opt in with `pytest -m thirdparty`, after `pip install -e ".[thirdparty]"`.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import moec

pytestmark = pytest.mark.thirdparty
H, T = 32, 16


def need(module: str):
    """The module, or a skip that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"the extra is not installed ({error}): pip install -e '.[thirdparty]'")


def litgpt():
    model, config = need("litgpt.model"), need("litgpt.config")
    sizes = dict(n_embd=H, moe_intermediate_size=24, n_expert=8, n_expert_per_token=2)
    return model.LLaMAMoE(config.Config.from_name("Mixtral-8x7B-v0.1", **sizes)), torch.randn(2, 7, H)


def litgpt_groups():
    model, config = need("litgpt.model"), need("litgpt.config")
    sizes = dict(n_embd=H, n_head=4, moe_intermediate_size=24, n_expert=8, n_expert_per_token=2, n_shared_expert=1)
    groups = dict(n_expert_groups=4, n_topk_groups=2, n_topk_scores_per_group=2, norm_topk_prob=True)
    return model.LLaMAMoE(config.Config(**sizes, **groups, bias=False)), torch.randn(2, 7, H)


def mixture_of_experts():
    return need("mixture_of_experts").MoE(H, num_experts=4), torch.randn(2, T, H)


def mixture_of_experts_in_two_levels():
    return need("mixture_of_experts").HeirarchicalMoE(H, num_experts=(2, 2)), torch.randn(2, T, H)


def st_moe():
    return need("st_moe_pytorch").MoE(H, num_experts=4, is_distributed=False), torch.randn(2, T, H)


def soft_moe():
    made = need("soft_moe_pytorch").SoftMoE(dim=H, seq_len=T, num_experts=4, is_distributed=False)
    return made, torch.randn(2, T, H)


def peer():
    made = need("PEER_pytorch").PEER(dim=H, heads=2, num_experts=16, num_experts_per_head=4, dim_key=8)
    return made, torch.randn(2, T, H)


def diffusers():
    image = need("diffusers.models.transformers.transformer_hidream_image")
    return image.MOEFeedForwardSwiGLU(H, 48, 4, 2), torch.randn(2, 7, H)


# what is expected of each: fused; or not, and a word of the reason that a reader gets
CASES = {
    litgpt: "fused",
    litgpt_groups: "fused",
    mixture_of_experts: "Data dependent operator",
    mixture_of_experts_in_two_levels: "Data dependent operator",
    st_moe: "Data dependent operator",
    soft_moe: "no MoE layer was found",
    peer: "no parameters that differ by choice",
    diffusers: "fused",
}


def run(call, x) -> list[Tensor]:
    torch.manual_seed(1)  # some draw second choices
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(call(x)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_module_is_fused_or_told_why_not_and_gives_what_it_gave(make):
    torch.manual_seed(0)
    model, x = make()
    model.eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    torch._dynamo.reset()
    with torch.no_grad():
        report = moec.explain(model, x, moec_options={"rest": "eager"})
    fused = [site for site in report.sites if site.status == "fused"]
    expected = CASES[make]
    assert bool(fused) == (expected == "fused"), str(report)
    if not fused:
        assert expected in str(report)
    got, wanted = run(torch.compile(model, backend="moec", options={"rest": "eager"}), x), run(model, x)
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()
