"""Tiny random instances of library models: a configuration is shrunk by what its fields are called."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import torch
from torch import nn

SIZES = (  # (pattern of a field's name, its value); the first that matches counts, None leaves the field
    (
        r".*(dropout|eps|theta|_ids?|token_index|coef|std|factor|scale|type|alpha|limit|beta|temperature|norm_topk).*",
        None,
    ),
    (r"(\w+_)?vocab_size(_per_layer_input)?", 160),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts", 2),
    (r"num_(local_|routed_|moe_)?experts?|n_routed_experts|moe_num_experts", 8),
    (r"n_group|num_expert_group", 4),
    (r"(mamba_)?n_groups", 1),
    (r"topk_group|zero_expert_num", 2),
    (r"n_shared_experts|num_shared_experts?|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|expert_layer_offset", 0),
    (r"interleave_moe_layer_step|decoder_sparse_step|moe_layer_interval|moe_layer_freq|expert_layer_period", 1),
    (r"(original_)?max_position_embeddings|max_(target|source)_positions|n_positions|sliding_window|max_seq_len", 256),
    (r"moe_intermediate_size|moe_ffn_hidden_size|expert_ffn_dim|expert_ffn_hidden_size|part_features", 24),
    (r"(moe_)?shared_expert_intermediate_size|shared_intermediate_size", 40),
    (r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|d_ff", 48),
    (r"num_sparse_(en|de)coder_layers", 1),
    (r".*_layers|n_layers?|depth", 2),
    (r".*num_key_value_heads.*|num_kv_heads", 2),
    (r".*num_attention_heads.*|.*attention_heads|n_heads?|num_heads|.*_num_heads|.*_n_heads", 4),
    (r".*head_dim|kv_channels|d_kv", 8),
    (r".*lora_rank|.*lora_dim|.*_rank", 16),
    (r"hidden_size_per_layer_input|.*emb.*dim", 8),
    (r".*hidden_size|d_model|n_embd|dim|.*_hidden_dim|out_hidden_size", 32),
    (r"image_size", 32),
    (r"patch_size|mamba_d_state|ssm_state_size|(mamba_)?chunk_size", 8),
    (r"index_topk", 64),
)
CAPS = re.compile(r"n_group|top.*|moe_k|num_experts_per.*")
"""Fields that are at most what the library's default is: 1 group stays 1 group."""


def defaults(cls: type) -> dict[str, Any]:
    """A configuration's own fields with their defaults."""
    found: dict[str, Any] = {}
    for each in fields(cls) if is_dataclass(cls) else ():
        if each.init and each.default is not MISSING:
            found[each.name] = each.default
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if parameter.default is not parameter.empty:
            found.setdefault(name, parameter.default)
    return found


def shrunk(name: str, value: int) -> int:
    """The value of a field in a tiny model."""
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            if size is None or value == 0:
                return value
            return min(size, value) if CAPS.fullmatch(name) else size
    return value


def tiny_config(cls: type, extras: Mapping[str, Mapping[str, Any]]) -> Any:
    """A small configuration; `extras`: what the class of that name needs besides."""
    base, parts = defaults(cls), getattr(cls, "sub_configs", {}) or {}
    given = dict(extras.get(cls.__name__, {}))
    said = {n: shrunk(n, v) for n, v in base.items() if n not in parts and type(v) is int}
    if "kv_lora_rank" in base:
        said["num_key_value_heads"] = 4
    said |= {n: v for n, v in TOKENS.items() if n in base} | given
    for name, part in parts.items():
        kind = part if inspect.isclass(part) and part.__name__ != "AutoConfig" else type(getattr(cls(), name, None))
        if name not in given and hasattr(kind, "model_type"):
            said[name] = tiny_config(kind, extras)
    config = cls(**said)
    kinds = getattr(config, "mlp_layer_types", None) or ()
    if "dense" in kinds and "sparse" not in kinds and "mlp_layer_types" not in said:
        config = cls(**said, mlp_layer_types=["sparse"] * len(kinds))
    return config


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_model(cls: type, extras: Mapping[str, Mapping[str, Any]], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random instance in evaluation mode, without dropout and jitter."""
    config = tiny_config(cls.config_class, extras)  # type: ignore[attr-defined]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=dtype, attn_implementation="eager")  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or not torch.isfinite(parameter).all():
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "jitter" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return model.eval()
