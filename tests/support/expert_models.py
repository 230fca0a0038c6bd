"""Tiny random models of every architecture whose experts lie in one parameter, and tokens for them."""

import torch
import transformers

WORDS = 97
DOWN = "experts.down_proj"
BOTH = ("experts.gate_up_proj", DOWN)
DECODER = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
ONE_GROUP = {**ROUTED, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**ONE_GROUP, **LATENT, "num_key_value_heads": 4, "head_dim": 4}

# class, configuration, what it has besides, number of experts that get adapters in all layers
MODELS = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", LOCAL, 8),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 16}, 8),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS, 8),
    # Weights lie transposed, gate and up are interleaved, with biases.
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", LOCAL, 8),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {**DEEPSEEK, "topk_method": "greedy"}, 4),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK, 4),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}, 8),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", LOCAL, 8),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", LOCAL, 8),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        4,
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", ONE_GROUP, 4),
    "dots1": ("Dots1ForCausalLM", "Dots1Config", {**ONE_GROUP, "n_shared_experts": 1}, 4),
    "minimax": ("MiniMaxForCausalLM", "MiniMaxConfig", LOCAL, 8),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
        4,
    ),
    "flex_olmo": ("FlexOlmoForCausalLM", "FlexOlmoConfig", {"num_experts": 4, "num_experts_per_tok": 2}, 8),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        4,
    ),
    "hunyuan_moe": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2}, 8),
    # No gate: up_proj in place of gate_up_proj.
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {**ONE_GROUP, "layers_block_type": ["attention", "moe"], "moe_latent_size": None, "use_mamba_kernels": False},
        4,
    ),
}


def make(kind, dtype=torch.float32):
    name, config, values, _ = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**{**DECODER, **values})).eval()
    # Random models say almost the same whatever they read.
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    return model.requires_grad_(False).to(dtype)


def parameters_of(kind):
    return ("experts.up_proj", DOWN) if kind == "nemotron_h" else BOTH


def ids(seed):
    return torch.randint(3, WORDS, (4, 24), generator=torch.Generator().manual_seed(seed))


def padded(seed):
    """A batch whose padding holds tokens that nothing else has."""
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[1:, 15:] = 0
    return {"input_ids": ids(seed).where(mask.bool(), 1), "attention_mask": mask}
