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
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
EXTRAS = {
    "BailingHybridConfig": {**HYBRID, "num_key_value_heads": 4},
    "DbrxConfig": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["sparse", "sparse"], "num_experts_per_tok": 2},
    "DeepseekV2Config": {
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
    },
    "DeepseekV4Config": {"mlp_layer_types": ["moe", "moe"]},
    "DiffusionGemmaTextConfig": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "Dots1Config": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": ROPE, "moe_intermediate_size": [24, 20]},
    "FlintConfig": {"mlp_only_layers": []},
    "Gemma4TextConfig": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "Glm4vMoeTextConfig": {"rope_parameters": ROPE, "head_dim": 8},
    "GraniteMoeHybridConfig": HYBRID,
    "HunYuanMoEV1Config": {"head_dim": 8, "moe_topk": 2, "num_experts": 8},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "Step3p7TextConfig": {"sliding_window": 16},
    "UnlimitedOcrTextConfig": {"num_key_value_heads": 4},
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
    "deepseek_ocr2:DeepseekOcr2TextModel",
    "deepseek_v2:DeepseekV2",
    "deepseek_v32:DeepseekV32",
    "deepseek_v3:DeepseekV3",
    "deepseek_v4:DeepseekV4",
    "diffusion_gemma:DiffusionGemmaEncoderTextModel",
    "dots1:Dots1",
    "dots3_note:Dots3Note",
    "ernie4_5_moe:Ernie4_5_Moe",
    "ernie4_5_vl_moe:Ernie4_5_VLMoeTextModel",
    "exaone_moe:ExaoneMoe",
    "flex_olmo:FlexOlmo",
    "flint:Flint",
    "gemma4:Gemma4",
    "glm4_moe:Glm4Moe",
    "glm4_moe_lite:Glm4MoeLite",
    "glm4v_moe:Glm4vMoeTextModel",
    "glm5_next:Glm5NextTextModel",
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
    "jamba:Jamba",
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
    "mistral_large4:MistralLarge4TextModel",
    "mixtral:Mixtral",
    "nemotron_h:NemotronH",
    "nllb_moe:NllbMoeForConditionalGeneration",
    "olmoe:Olmoe",
    "openai_privacy_filter:OpenAIPrivacyFilterForTokenClassification",
    "phimoe:Phimoe",
    "qwen2_moe:Qwen2Moe",
    "qwen3_5_moe:Qwen3_5Moe",
    "qwen3_moe:Qwen3Moe",
    "qwen3_next:Qwen3Next",
    "qwen3_omni_moe:Qwen3OmniMoeThinkerTextModel",
    "qwen3_vl_moe:Qwen3VLMoeTextModel",
    "qwen4_exp:Qwen4Exp",
    "solar_open:SolarOpen",
    "step3p7:Step3p7TextModel",
    "switch_transformers:SwitchTransformersForConditionalGeneration",
    "unlimited_ocr:UnlimitedOcrTextModel",
    "zaya:Zaya",
]


def compiled(model, report):
    torch._dynamo.reset()
    return torch.compile(model, backend=Backend(Options.make({"rest": "eager"}), report=report))


def error(got, want):
    """The largest relative error of tensors; one that is missing counts as zeros.

    One that is zero but for rounding, as the gradient of a key's bias, is measured by the largest of all.
    """
    pairs = [(torch.zeros_like(w) if g is None else g, w) for g, w in zip(got, want, strict=True) if w is not None]
    least = max(1e-4, 1e-5 * max(float(w.norm()) for _, w in pairs))
    return max(float((g - w).norm()) / max(float(w.norm()), least) for g, w in pairs)


def given(model):
    """The model's inputs: token ids; for a model of two parts those of both, with masks."""
    ids = torch.randint(3, 120, (2, 13), generator=torch.Generator().manual_seed(1))
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "use_cache": False} if hasattr(model.config, "use_cache") else {"input_ids": ids}
    inner, mask = ids[:, :7], torch.ones_like(ids)
    both = {"decoder_input_ids": inner, "decoder_attention_mask": mask[:, :7]}
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False, **both}


@pytest.mark.zoo
@pytest.mark.parametrize("name", MODELS)
def test_fused_in_one_graph_with_equal_outputs_and_gradients(name):
    folder, cls = name.split(":")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    model = tiny_model(getattr(module, cls, None) or getattr(module, f"{cls}ForCausalLM"), EXTRAS)
    inputs = given(model)

    def step(run):
        model.zero_grad()
        out = run(**inputs)[0]
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        return out.detach(), [p.grad for p in model.parameters()]

    report = Report()
    with torch.no_grad():
        want = model(**inputs)[0]
        got = compiled(model, report)(**inputs)[0]
    assert report.graphs == 1, report.graph_breaks
    assert report.sites, report
    assert {site.status for site in report.sites} == {"fused"}, report
    assert error([got], [want]) < 1e-5
    logits, gradients = step(model)
    theirs, others = step(compiled(model, Report()))
    assert error([theirs], [logits]) < 1e-5
    assert error(others, gradients) < 1e-3
