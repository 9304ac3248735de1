"""Mixtures of experts, and low-rank attention (MLA).

`{expert}` in a name is replaced by the index of every expert; the axis `e` runs over experts, `x` over the neurons of
each and `y` over those of shared experts together.
"""

from dataclasses import replace
from typing import Any

from pipeline.model.families.table import (
    ATTENTION,
    ATTENTION_BIASES,
    GATE_UP,
    GATED,
    NORM_BIASES,
    NORMS,
    QK_NORM,
    QK_NORM_ALL,
    QKV,
    Family,
)

WHOLE = {"neurons": "its FFN neurons are those of experts, which shape.expert_neurons narrows"}
LOW_RANK = "queries, keys and values are products of low-rank matrices (MLA)"
MLA_FIXED = {"heads": LOW_RANK, "groups": LOW_RANK}
MLA_LENGTHS = {
    "r": ("q_lora_rank",),
    "s": ("kv_lora_rank",),
    "t": ("kv_lora_rank", "qk_rope_head_dim"),
    "c": ("qk_nope_head_dim", "qk_rope_head_dim"),
    "w": ("qk_nope_head_dim", "v_head_dim"),
    "u": ("v_head_dim",),
}
MLA = {
    "self_attn.q_proj.weight": "(n c) h",
    "self_attn.q_a_proj.weight": "r h",
    "self_attn.q_a_proj.bias": "r",
    "self_attn.q_a_layernorm.weight": "r",
    "self_attn.q_b_proj.weight": "(n c) r",
    "self_attn.kv_a_proj_with_mqa.weight": "t h",
    "self_attn.kv_a_proj_with_mqa.bias": "t",
    "self_attn.kv_a_layernorm.weight": "s",
    "self_attn.kv_b_proj.weight": "(n w) s",
    "self_attn.o_proj.weight": "h (n u)",
    "self_attn.o_proj.bias": "h",
}
MLA_OPTIONAL = ("self_attn.q_proj.", "self_attn.q_a_proj.", "self_attn.q_a_layernorm.", "self_attn.q_b_proj.")
MLA_READERS = ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")


def experts(names: tuple[str, ...], axis: str, router: str) -> dict[str, str]:
    """Return the tensors of experts with gate, up and down projections, and of their router."""
    gate, up, down = names
    return {router: "e h", f"{gate}.weight": f"{axis} h", f"{up}.weight": f"{axis} h", f"{down}.weight": f"h {axis}"}


def shared(name: str, axis: str) -> dict[str, str]:
    """Return the tensors of a gated FFN that every token passes through."""
    return {
        f"{name}.gate_proj.weight": f"{axis} h",
        f"{name}.up_proj.weight": f"{axis} h",
        f"{name}.down_proj.weight": f"h {axis}",
    }


NAMED = tuple(f"mlp.experts.{{expert}}.{name}_proj" for name in ("gate", "up", "down"))
MIXTRAL = tuple(f"block_sparse_moe.experts.{{expert}}.{name}" for name in ("w1", "w3", "w2"))
GRANITE_EXPERTS = {
    "block_sparse_moe.router.layer.weight": "e h",
    "block_sparse_moe.input_linear.weight": "e (2 x) h",
    "block_sparse_moe.output_linear.weight": "e h x",
}
EXPERT_WIDTH = {"x": ("moe_intermediate_size",)}
ONE_SHARED = EXPERT_WIDTH | {"y": ("shared_expert_intermediate_size",)}
FFN_WIDTH = {"x": ("intermediate_size",)}
SPARSE = {"decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)}
PRE = {"input_layernorm": QKV, "post_attention_layernorm": ()}
ROUTED = experts(NAMED, "x", "mlp.gate.weight")
COMMON: dict[str, Any] = {"top_k": "num_experts_per_tok", "fixed": WHOLE}
DENSE_FIRST: dict[str, Any] = {
    "optional": (
        "mlp.gate_proj.",
        "mlp.up_proj.",
        "mlp.down_proj.",
        "mlp.experts.",
        "mlp.gate.",
        "mlp.shared_experts.",
    ),
    "leading_dense": "first_k_dense_replace",
    "experts": ("n_routed_experts",),
    "top_k": "num_experts_per_tok",
    "expert_groups": "n_group",
    "chosen_groups": "topk_group",
    "fixed": WHOLE,
}
DEEPSEEK_FFN = ROUTED | shared("mlp.shared_experts", "y") | {"mlp.gate.e_score_correction_bias": "e"} | GATED
DEEPSEEK_LENGTHS = EXPERT_WIDTH | {"y": ("moe_intermediate_size*n_shared_experts",)}
DEEPSEEK = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    MLA | DEEPSEEK_FFN | NORMS,
    PRE | {"input_layernorm": MLA_READERS},
    lengths=DEEPSEEK_LENGTHS | MLA_LENGTHS,
    **(DENSE_FIRST | {"fixed": WHOLE | MLA_FIXED, "optional": (*DENSE_FIRST["optional"], *MLA_OPTIONAL)}),
)
MIXTRAL_FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    ATTENTION | experts(MIXTRAL, "x", "block_sparse_moe.gate.weight") | NORMS,
    PRE,
    lengths=FFN_WIDTH,
    experts=("num_local_experts",),
    top_k="num_experts_per_tok",
    fixed=WHOLE,
)

EXPERTS = (
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        ATTENTION | ATTENTION_BIASES | QK_NORM | ROUTED | NORMS,
        PRE,
        lengths=EXPERT_WIDTH,
        requires=SPARSE,
        experts=("num_experts", "num_local_experts"),
        top_k="num_experts_per_tok",
        fixed=WHOLE,
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        ATTENTION
        | ATTENTION_BIASES
        | ROUTED
        | shared("mlp.shared_expert", "y")
        | {"mlp.shared_expert_gate.weight": "1 h"}
        | NORMS,
        PRE,
        lengths=EXPERT_WIDTH | {"y": ("shared_expert_intermediate_size",)},
        requires=SPARSE,
        experts=("num_experts", "num_local_experts"),
        top_k="num_experts_per_tok",
        fixed=WHOLE,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        ATTENTION | ATTENTION_BIASES | QK_NORM_ALL | ROUTED | NORMS,
        PRE,
        lengths=FFN_WIDTH,
        fields={"head_size": None},
        whole_heads=True,
        experts=("num_experts", "num_local_experts"),
        top_k="num_experts_per_tok",
        fixed=WHOLE,
    ),
    MIXTRAL_FAMILY,
    replace(
        MIXTRAL_FAMILY,
        model_type="minimax_m2",
        architecture="MiniMaxM2ForCausalLM",
        layer=dict(MIXTRAL_FAMILY.layer) | QK_NORM_ALL | {"block_sparse_moe.e_score_correction_bias": "e"},
    ),
    replace(
        MIXTRAL_FAMILY,
        model_type="phimoe",
        architecture="PhimoeForCausalLM",
        layer=dict(MIXTRAL_FAMILY.layer) | ATTENTION_BIASES | NORM_BIASES,
        outer={"model.norm.bias": "h", "lm_head.bias": "v"},
        layer_norm=True,
    ),
    Family(
        "granitemoe",
        "GraniteMoeForCausalLM",
        ATTENTION | ATTENTION_BIASES | GRANITE_EXPERTS | NORMS,
        PRE,
        lengths=FFN_WIDTH,
        experts=("num_local_experts",),
        expert_module="block_sparse_moe.experts",
        top_k="num_experts_per_tok",
        logit_divisor="logits_scaling",
        fixed=WHOLE,
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        ATTENTION
        | ATTENTION_BIASES
        | {
            "self_attn.sinks": "n",
            "mlp.router.weight": "e h",
            "mlp.router.bias": "e",
            "mlp.experts.gate_up_proj": "e h (x 2)",
            "mlp.experts.gate_up_proj_bias": "e (x 2)",
            "mlp.experts.down_proj": "e x h",
            "mlp.experts.down_proj_bias": "e h",
        }
        | NORMS,
        PRE,
        lengths=FFN_WIDTH,
        experts=("num_local_experts",),
        rotary="class",
        top_k="num_experts_per_tok",
        fixed=WHOLE,
    ),
    DEEPSEEK,
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        ATTENTION | ATTENTION_BIASES | QK_NORM | DEEPSEEK_FFN | NORMS,
        PRE,
        lengths=DEEPSEEK_LENGTHS,
        **(DENSE_FIRST | {"optional": (*DENSE_FIRST["optional"], "self_attn.q_norm.", "self_attn.k_norm.")}),
    ),
    Family(
        "dots1",
        "Dots1ForCausalLM",
        ATTENTION | ATTENTION_BIASES | QK_NORM | DEEPSEEK_FFN | NORMS,
        PRE,
        lengths=DEEPSEEK_LENGTHS,
        **DENSE_FIRST,
    ),
    Family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        ATTENTION
        | ATTENTION_BIASES
        | {"self_attn.query_layernorm.weight": "d", "self_attn.key_layernorm.weight": "d"}
        | experts(NAMED, "x", "mlp.gate.wg.weight")
        | shared("mlp.shared_mlp", "y")
        | NORMS,
        PRE,
        lengths=FFN_WIDTH | {"y": ("intermediate_size",)},
        experts=("num_experts",),
        top_k="moe_topk",
        fixed=WHOLE,
    ),
    Family(
        "youtu",
        "YoutuForCausalLM",
        MLA | GATED | NORMS,
        {"input_layernorm": MLA_READERS, "post_attention_layernorm": GATE_UP},
        optional=MLA_OPTIONAL,
        lengths=MLA_LENGTHS,
        fixed=MLA_FIXED,
    ),
    Family(
        "minicpm3",
        "MiniCPM3ForCausalLM",
        MLA | GATED | NORMS,
        {"input_layernorm": MLA_READERS, "post_attention_layernorm": GATE_UP},
        optional=MLA_OPTIONAL,
        lengths=MLA_LENGTHS,
        fixed=MLA_FIXED | {"hidden": "its logits are divided by a multiple of the hidden size"},
        depth_scaled=("scale_depth",),
        logit_divisor="logits_scaling",
    ),
    Family(
        "kolibri1",
        "Kolibri1ForCausalLM",
        ATTENTION
        | QK_NORM
        | ROUTED
        | shared("mlp.shared_experts", "y")
        | {"mlp.gate.e_score_correction_bias": "e"}
        | NORMS
        | {"post_self_attn_layernorm.weight": "h", "post_mlp_layernorm.weight": "h"},
        PRE | {"post_self_attn_layernorm": (), "post_mlp_layernorm": ()},
        lengths=ONE_SHARED,
        disk=(
            ("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
            ("post_attn_norm", "post_self_attn_layernorm"),
            ("post_ffn_norm", "post_mlp_layernorm"),
        ),
        experts=("num_local_experts", "num_experts"),
        **COMMON,
    ),
)
