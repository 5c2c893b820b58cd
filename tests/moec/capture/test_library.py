"""Whole models of a library, unmodified, with their eager expert loops: one graph, equal to eager, in training too."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "Mixtral": {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"]},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def build(name):
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MODELS[name]})
    config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", MODELS)
def test_one_graph(name, recorder):
    model = build(name).eval()
    compiled = torch.compile(model, backend=recorder, dynamic=True)
    for length in (7, 12):
        ids = torch.randint(3, 64, (2, length))
        with torch.no_grad():
            got = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(got, model(input_ids=ids, use_cache=False).logits, rtol=1e-6, atol=1e-6)
    assert len(recorder.graphs) == 1
    assert recorder.anchors == (2 if name == "Mixtral" else 1)
    assert recorder.declined == ()


def test_training(recorder):
    model = build("Qwen3Moe").train()
    ids = torch.randint(3, 64, (2, 9))
    compiled = torch.compile(model, backend=recorder)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-6)
    assert len(recorder.graphs) == 1
