"""Tiny random models of the real classes: every parameter random, also gains and biases, so that none hides in ones."""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from pipeline.model.anatomy import Anatomy
from pipeline.model.families import FAMILIES, Family, family_for
from pipeline.model.sizes import Sizes

BASE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = ["sliding_attention", "full_attention"] * 2
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "moe_intermediate_size": 12,
}
LOW_RANK = {
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
LINEAR = {
    "layer_types": ["linear_attention"] * 2 + ["full_attention"] * 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_conv_kernel_dim": 3,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 4,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
}
GRANITE_HYBRID = MAMBA | {
    "layer_types": ["mamba", "mamba", "attention", "attention"],
    "shared_intermediate_size": 24,
    "logits_scaling": 5.0,
}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
INDEX = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 32}
GEMMA4 = {
    "num_hidden_layers": 6,
    "layer_types": WINDOWS + WINDOWS[:2],
    "sliding_window": 8,
    "global_head_dim": 16,
    "final_logit_softcapping": 30.0,
}
EMBEDDED = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 96}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12}
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 8}

# Config fields beside BASE of every type with a table, by model_type, and of further settings as `model_type-setting`.
TINY: dict[str, dict] = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "layer_types": WINDOWS},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "olmo2": {},
    "phi3": {},
    "phi3-longrope": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [1.0] * 4,
        },
    },
    "gemma": {},
    "vaultgemma": {**GEMMA, "layer_types": WINDOWS},
    "ministral": {"sliding_window": 8, "layer_types": WINDOWS},
    "ministral3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "granite": {
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.4,
        "logits_scaling": 5.0,
    },
    "granite_swa": {"logits_scaling": 5.0, "sliding_window": 8},
    "cwm": {"sliding_window": 8, "layer_types": WINDOWS},
    "internlm3": {},
    "iquestcoder": {},
    "hyperclovax": {"logits_scaling": 0.3, "residual_multiplier": 0.4},
    "hyperclovax-no-post-norms": {"use_post_norm": False},
    "exaone4": {"sliding_window": 8, "layer_types": WINDOWS},
    "olmo3": {"sliding_window": 8, "layer_types": WINDOWS},
    "hunyuan_v1_dense": {"attention_bias": True},
    "helium": {"attention_bias": True},
    "arcee": {"mlp_bias": True},
    "starcoder2": {},
    "nemotron": {},
    "jais2": {},
    "stablelm": {"use_qkv_bias": True},
    "stablelm-parallel": {"use_parallel_residual": True},
    "phi": {},
    "persimmon": {},
    "gpt_neox": {},
    "gpt_neox-serial": {"use_parallel_residual": False},
    "bloom": {},
    "gpt2": {"n_inner": 24},
    "gpt-sw3": {},
    "gpt_bigcode": {"n_inner": 24},
    "gpt_bigcode-heads": {"n_inner": 24, "multi_query": False},
    "gptj": {"n_inner": 24, "rotary_dim": 4},
    "codegen": {"n_inner": 24, "rotary_dim": 4},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 32},
    "biogpt": {},
    "xglm": {"ffn_dim": 24},
    "ctrl": {"dff": 24},
    "mpt": {},
    "falcon": {"ffn_hidden_size": 24},
    "falcon-groups": {"ffn_hidden_size": 24, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-one-norm": {
        "ffn_hidden_size": 24,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
    },
    "falcon-serial": {"ffn_hidden_size": 24, "multi_query": False, "parallel_attn": False},
    "olmo": {},
    "nanochat": {"final_logit_softcapping": 5.0},
    "apertus": {},
    "apertus1p5_text": {},
    "cohere": {"logit_scale": 0.3, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.3, "sliding_window": 8, "layer_types": WINDOWS},
    "doge": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 5.0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "layer_types": WINDOWS},
    "deepseek_v3": ROUTED | LOW_RANK,
    "deepseek_v3-groups": ROUTED
    | LOW_RANK
    | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "q_lora_rank": None},
    "glm4_moe": ROUTED | {"use_qk_norm": True},
    "dots1": ROUTED,
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR | FEW | {"shared_expert_intermediate_size": 20, "norm_topk_prob": True},
    "qwen3_5_moe_text": LINEAR | FEW | {"shared_expert_intermediate_size": 20},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3, "mamba_rms_norm": True},
    "bamba": MAMBA | {"attn_layer_indices": [2, 3]},
    "granitemoehybrid": GRANITE_HYBRID | {"num_local_experts": 0, "num_experts_per_tok": 0},
    "granitemoehybrid-experts": GRANITE_HYBRID | {"num_local_experts": 6, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "full_attention"], "block_auto_adjust_ff_dim": False},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 12,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "solar_open": ROUTED,
    "sarvam_mla": ROUTED | LOW_RANK,
    "glm4_moe_lite": ROUTED | LOW_RANK,
    "deepseek_v2": ROUTED | LOW_RANK,
    "deepseek_v32": ROUTED | LOW_RANK | INDEX,
    "glm_moe_dsa": ROUTED | LOW_RANK | INDEX | {"index_topk": 4, "indexer_types": ["full", "shared", "full", "shared"]},
    "exaone_moe": FEW | {"first_k_dense_replace": 1, "num_shared_experts": 2, "n_group": 1, "topk_group": 1},
    "afmoe": FEW | {"num_dense_layers": 1, "num_shared_experts": 2, "sliding_window": 8},
    "cohere2_moe": FEW | {"logit_scale": 0.3, "sliding_window": 8, "layer_types": WINDOWS},
    "flex_olmo": FEW,
    "flint": FEW | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0, 1], "sliding_window": 8},
    "kolibri1": FEW | {"shared_expert_intermediate_size": 20, "sliding_window": 8, "layer_types": WINDOWS},
    "granitemoeshared": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "intermediate_size": 20,
        "logits_scaling": 5.0,
    },
    "granitemoe_swa": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 5.0, "sliding_window": 8},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2},
    "mellum": FEW | {"num_local_experts": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "laguna": FEW | {"num_experts": 6, "shared_expert_intermediate_size": 20},
    "hy_v3": FEW | {"num_shared_experts": 2},
    "llama4_text": {
        "intermediate_size_mlp": 20,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 8,
        "floor_scale": 4,
    },
    "minimax_m3_vl_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 20,
    },
    "lfm2_moe": FEW | {"layer_types": ["conv", "conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "conv", "full_attention", "full_attention"], "sliding_window": 8},
    "gemma4_text": GEMMA4 | EMBEDDED | {"num_kv_shared_layers": 3, "use_double_wide_mlp": True},
    "gemma4_text-plain": GEMMA4
    | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma4_text-experts": GEMMA4 | GEMMA4_EXPERTS | {"hidden_size_per_layer_input": 0},
    "gemma4_text-all": GEMMA4 | GEMMA4_EXPERTS | EMBEDDED | {"num_kv_shared_layers": 2, "attention_bias": True},
    "gemma4_unified_text": GEMMA4 | {"num_kv_shared_layers": 2},
    "kimi_linear": LOW_RANK
    | {
        "q_lora_rank": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 12,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "full_attention"],
        "linear_head_dim": 6,
        "linear_num_heads": 3,
        "linear_conv_kernel_dim": 3,
    },
    "exaone": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 4,
        "n_groups": 2,
        "conv_kernel": 3,
        "mlp_bias": True,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gpt_neox_japanese": {},
    "minicpm3": LOW_RANK | {"scale_depth": 1.4, "dim_model_base": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention", "attention"], "intermediate_size": 48},
    "youtu": LOW_RANK | {"pad_token_id": None},  # whose class zeroes the embedding of padding when it loads
}
FLOAT32 = {"xglm"}  # whose class overflows in float64
REPRESENTATIVE = tuple(TINY)[:12]  # the kinds on which every method is tested


def model_type(kind: str) -> str:
    """Return the model_type of a kind."""
    return kind if kind in FAMILIES else kind.partition("-")[0]


def family(kind: str) -> Family:
    """Return the table of a kind, in the variant for its settings."""
    return family_for({**BASE, **TINY[kind], "model_type": model_type(kind)})


CLASSES = {
    kind: (type(AutoConfig.for_model(model_type(kind))).__name__, FAMILIES[model_type(kind)].architecture)
    for kind in REPRESENTATIVE
}


def tiny_config(kind: str, **changed):
    """Return the config of a tiny model of a kind, with some fields changed."""
    config_class = type(AutoConfig.for_model(model_type(kind)))
    fields = {**BASE, **TINY[kind], **changed}
    if FAMILIES[model_type(kind)].field("head_size") is None:
        del fields["head_dim"]
    return config_class(**fields, attn_implementation="eager")


def tiny_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changed):
    """Return a tiny model of a kind, in evaluation mode, every parameter drawn from a normal of deviation 0.3."""
    model = getattr(transformers, FAMILIES[model_type(kind)].architecture)(tiny_config(kind, **changed))
    model = model.to(torch.float32 if kind in FLOAT32 else dtype).eval()
    if family(kind).experts:
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        stored = ("correction_bias", "layer_scalar")
        buffers = (buffer for name, buffer in model.named_buffers() if any(part in name for part in stored))
        for parameter in (*model.parameters(), *buffers):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def save_tiny(model, folder: Path) -> Path:
    """Save a model as a folder through safetensors, the tied output matrix left out as transformers does."""
    model.save_pretrained(folder)
    return folder


def anatomy_with(sizes: Sizes, kind: str = "llama", tied: bool = True) -> Anatomy:
    """Return the anatomy of a family's model of these sizes, with the weights of its table alone."""
    family = FAMILIES[kind]
    weights = frozenset(name for name in family.layer if name.endswith(".weight"))
    return Anatomy(family, sizes, weights, tied, ("full_attention",) * len(sizes.layers))


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Return the checkpoint tensors of a model: its state without the tied copy."""
    family = FAMILIES[model.config.model_type]
    state = {family.named(name): each for name, each in revert_weight_conversion(model, model.state_dict()).items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")}
    if model.config.tie_word_embeddings:
        state.pop(f"{FAMILIES[model.config.model_type].head}.weight")
    return state


def config_of(model) -> dict:
    return json.loads(json.dumps(model.config.to_dict()))


def tokens(batch: int = 2, length: int = 12, vocabulary: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
