"""Library models of the field as tiny random instances: every MoE family that moec must take unmodified."""

from __future__ import annotations

import os

import torch
from torch import nn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

COMMON = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

# model type → (configuration class, what its configuration adds to COMMON, how many of its layers are MoE)
MODELS = {
    "mixtral": ("MixtralConfig", dict(num_local_experts=8, num_experts_per_tok=2), 2),
    "qwen3_moe": ("Qwen3MoeConfig", dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24), 2),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40),
        2,
    ),
    "olmoe": ("OlmoeConfig", dict(num_experts=8, num_experts_per_tok=3), 2),
    "deepseek_v3": (
        "DeepseekV3Config",
        dict(
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            num_key_value_heads=4,
        ),
        1,
    ),
    "gpt_oss": (
        "GptOssConfig",
        dict(num_local_experts=8, num_experts_per_tok=2, layer_types=["full_attention"] * 2),
        2,
    ),
    "granitemoe": ("GraniteMoeConfig", dict(num_local_experts=8, num_experts_per_tok=2), 2),
    "phimoe": ("PhimoeConfig", dict(num_local_experts=8, num_experts_per_tok=2), 2),
    "llama4_text": (
        "Llama4TextConfig",
        dict(num_local_experts=8, num_experts_per_tok=1, interleave_moe_layer_step=1, intermediate_size_mlp=48),
        2,
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        dict(moe_num_experts=8, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=0),
        2,
    ),
}

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")

CASES = tuple((name, how) for name in MODELS for how in IMPLEMENTATIONS if how == "eager" or name != "llama4_text")
"""Every family in every experts implementation that the library offers for it."""


def library_model(name: str, implementation: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    """A random model of the family `name`, in evaluation mode, with that experts implementation; its last is MoE."""
    import transformers

    config_class, extra, _ = MODELS[name]
    values = {**COMMON, **extra, "num_hidden_layers": layers}
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][:layers]
    if "first_k_dense_replace" in values:
        values["first_k_dense_replace"] = min(values["first_k_dense_replace"], layers - 1)
    config = getattr(transformers, config_class)(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, experts_implementation=implementation, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():  # some families start experts or routers at zero
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(tokens: int, batch: int = 2) -> torch.Tensor:
    """Random token ids [batch, tokens]."""
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))
