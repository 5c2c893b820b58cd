"""Every MoE model of the library, unmodified and tiny: all layers fused, one graph, the model's logits and gradients.

Opt in with `-m zoo`: some 10 s a model, forward and a training step.
"""

from __future__ import annotations

import importlib

import pytest
import torch

transformers = pytest.importorskip("transformers")
from tiny_models import tiny_model  # noqa: E402

from moec.backend import Backend  # noqa: E402
from moec.options import Options  # noqa: E402
from moec.report import Report  # noqa: E402

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
EXTRAS = {
    "BailingHybridConfig": {**HYBRID, "num_key_value_heads": 4},
    "DbrxConfig": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "DeepseekV2Config": {
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
    },
    "DeepseekV4Config": {"mlp_layer_types": ["moe", "moe"]},
    "Dots1Config": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1},
    "FlintConfig": {"mlp_only_layers": []},
    "Gemma4TextConfig": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "GraniteMoeHybridConfig": HYBRID,
    "HunYuanMoEV1Config": {"head_dim": 8, "moe_topk": 2, "num_experts": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
}

MODELS = [
    "afmoe:Afmoe",
    "aria:AriaText",
    "axk1:AXK1",
    "axk2:AXK2",
    "bailing_hybrid:BailingHybrid",
    "beam:Beam",
    "cohere2_moe:Cohere2Moe",
    "dbrx:Dbrx",
    "deepseek_v2:DeepseekV2",
    "deepseek_v3:DeepseekV3",
    "deepseek_v32:DeepseekV32",
    "deepseek_v4:DeepseekV4",
    "dots1:Dots1",
    "ernie4_5_moe:Ernie4_5_Moe",
    "exaone_moe:ExaoneMoe",
    "flex_olmo:FlexOlmo",
    "flint:Flint",
    "gemma4:Gemma4",
    "glm4_moe:Glm4Moe",
    "glm4_moe_lite:Glm4MoeLite",
    "glm_moe_dsa:GlmMoeDsa",
    "gpt_oss:GptOss",
    "granitemoe:GraniteMoe",
    "granitemoe_swa:GraniteMoeSWA",
    "granitemoehybrid:GraniteMoeHybrid",
    "granitemoeshared:GraniteMoeShared",
    "hunyuan_v1_moe:HunYuanMoEV1",
    "hy_v3:HYV3",
    "hy_v4:HYV4",
    "inkling2:Inkling2",
    "kolibri1:Kolibri1",
    "laguna:Laguna",
    "lfm2_moe:Lfm2Moe",
    "llama4:Llama4",
    "longcat_flash:LongcatFlash",
    "mellum:Mellum",
    "mimo_v2_flash:MiMoV2Flash",
    "minimax:MiniMax",
    "minimax_m2:MiniMaxM2",
    "minimax_m3_vl:MiniMaxM3VL",
    "mistral4:Mistral4",
    "mixtral:Mixtral",
    "nemotron_h:NemotronH",
    "olmoe:Olmoe",
    "phimoe:Phimoe",
    "qwen2_moe:Qwen2Moe",
    "qwen3_moe:Qwen3Moe",
    "solar_open:SolarOpen",
    "zaya:Zaya",
]


def compiled(model, report):
    torch._dynamo.reset()
    return torch.compile(model, backend=Backend(Options.make({"rest": "eager"}), report=report))


def error(got, want):
    """The largest relative error of tensors; one that is missing counts as zeros."""
    pairs = [(torch.zeros_like(w) if g is None else g, w) for g, w in zip(got, want, strict=True) if w is not None]
    return max(float((g - w).norm()) / max(float(w.norm()), 1e-4) for g, w in pairs)


@pytest.mark.zoo
@pytest.mark.parametrize("name", MODELS)
def test_fused_in_one_graph_with_equal_logits_and_gradients(name):
    folder, prefix = name.split(":")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    model = tiny_model(getattr(module, f"{prefix}ForCausalLM"), EXTRAS)
    ids = torch.randint(3, 120, (2, 13), generator=torch.Generator().manual_seed(1))

    def step(run):
        model.zero_grad()
        out = run(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        return out.logits.detach(), [p.grad for p in model.parameters()]

    report = Report()
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        got = compiled(model, report)(input_ids=ids, use_cache=False).logits
    assert report.graphs == 1, report.graph_breaks
    assert report.sites, report
    assert {site.status for site in report.sites} == {"fused"}, report
    assert error([got], [want]) < 1e-5
    logits, gradients = step(model)
    theirs, others = step(compiled(model, Report()))
    assert error([theirs], [logits]) < 1e-5
    assert error(others, gradients) < 1e-3
