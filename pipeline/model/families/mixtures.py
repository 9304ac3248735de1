"""Further mixtures of experts: with shared experts, dense first layers, gated attention, norms after a sublayer.

A norm after a sublayer with experts is listed among the norms without a reader: it is narrowed with the hidden channels
and never absorbed.
"""

from dataclasses import replace
from typing import Any

from pipeline.model.families.experts import (
    COMMON,
    DEEPSEEK,
    DEEPSEEK_FFN,
    DENSE_FIRST,
    EXPERT_WIDTH,
    FFN_WIDTH,
    GRANITE_EXPERTS,
    MLA_READERS,
    NAMED,
    ONE_SHARED,
    PRE,
    ROUTED,
    WHOLE,
    experts,
    shared,
)
from pipeline.model.families.table import (
    ATTENTION,
    ATTENTION_BIASES,
    GATED,
    NORMS,
    POST_NORMS,
    QK_NORM,
    QK_NORM_ALL,
    QKV,
    Family,
)

FULL = ATTENTION | ATTENTION_BIASES
DENSE_OR_SPARSE = tuple(DENSE_FIRST["optional"])
LISTED: dict[str, Any] = COMMON | {"optional": DENSE_OR_SPARSE, "lengths": EXPERT_WIDTH}
SHARED_WIDTH = EXPERT_WIDTH | {"y": ("moe_intermediate_size*num_shared_experts",)}
HEADS_LISTED = "its config lists the heads of each layer"
INDEXER = {
    "self_attn.indexer.wq_b.weight": "o r",
    "self_attn.indexer.wk.weight": "b h",
    "self_attn.indexer.k_norm.weight": "b",
    "self_attn.indexer.k_norm.bias": "b",
    "self_attn.indexer.weights_proj.weight": "i h",
}
INDEXED = replace(
    DEEPSEEK,
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    layer=dict(DEEPSEEK.layer) | INDEXER,
    pre_norms={
        "input_layernorm": (*MLA_READERS, "self_attn.indexer.wk", "self_attn.indexer.weights_proj"),
        "post_attention_layernorm": (),
    },
    lengths=dict(DEEPSEEK.lengths)
    | {"o": ("index_n_heads*index_head_dim",), "b": ("index_head_dim",), "i": ("index_n_heads",)},
    leading_dense=None,
    superseded=("first_k_dense_replace",),
)

MIXTURES = (
    replace(
        INDEXED,
        model_type="glm_moe_dsa",
        architecture="GlmMoeDsaForCausalLM",
        optional=(*INDEXED.optional, "self_attn.indexer."),
        reused=("self_attn.indexer.",),
        passes_on="prev_topk_indices",
        tuples=True,
        superseded=(*INDEXED.superseded, "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern"),
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        FULL
        | ROUTED
        | shared("mlp.shared_experts", "y")
        | {"mlp.moe_statics.e_score_correction_bias": "1 e"}
        | GATED
        | NORMS,
        PRE,
        optional=(*DENSE_OR_SPARSE, "mlp.moe_statics."),
        lengths=EXPERT_WIDTH | {"y": ("moe_intermediate_size*moe_num_shared_experts",)},
        requires={"moe_layer_interval": (1, None), "use_bias": (False, None)},
        leading_dense="moe_layer_start_index",
        superseded=("moe_layer_end_index",),
        experts=("moe_num_experts",),
        top_k="moe_k",
        rotary="interleave",
        fixed=WHOLE,
    ),
    Family(
        "solar_open",
        "SolarOpenForCausalLM",
        FULL | {name: axes for name, axes in DEEPSEEK_FFN.items() if name not in GATED} | NORMS,
        PRE,
        lengths=dict(DEEPSEEK.lengths),
        experts=("n_routed_experts",),
        expert_groups="n_group",
        **COMMON,
    ),
    replace(DEEPSEEK, model_type="sarvam_mla"),
    replace(
        DEEPSEEK,
        model_type="glm4_moe_lite",
        architecture="Glm4MoeLiteForCausalLM",
        fields={"head_size": "qk_rope_head_dim"},
        leading_dense=None,
        superseded=("first_k_dense_replace",),
    ),
    replace(
        DEEPSEEK,
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        layer={name: axes for name, axes in DEEPSEEK.layer.items() if "correction" not in name},
        rotary="class",
    ),
    INDEXED,
    Family(
        "exaone_moe",
        "ExaoneMoeForCausalLM",
        FULL
        | QK_NORM
        | ROUTED
        | shared("mlp.shared_experts", "y")
        | {"mlp.e_score_correction_bias": "e"}
        | GATED
        | NORMS,
        PRE,
        **LISTED | {"optional": (*DENSE_OR_SPARSE, "mlp.e_score_correction_bias"), "lengths": SHARED_WIDTH},
        leading_dense="first_k_dense_replace",
        experts=("num_experts",),
        expert_groups="n_group",
        rotary="class",
    ),
    Family(
        "afmoe",
        "AfmoeForCausalLM",
        FULL
        | QK_NORM
        | {"self_attn.gate_proj.weight": "(n d) h"}
        | experts(NAMED, "x", "mlp.router.gate.weight")
        | shared("mlp.shared_experts", "y")
        | {"mlp.expert_bias": "e"}
        | GATED
        | NORMS
        | {"pre_mlp_layernorm.weight": "h", "post_mlp_layernorm.weight": "h"},
        {
            "input_layernorm": (*QKV, "self_attn.gate_proj"),
            "post_attention_layernorm": (),
            "pre_mlp_layernorm": (),
            "post_mlp_layernorm": (),
        },
        optional=(*DENSE_OR_SPARSE, "mlp.expert_bias", "mlp.router."),
        lengths=SHARED_WIDTH,
        requires={"mup_enabled": (False, None)},
        leading_dense="num_dense_layers",
        experts=("num_experts",),
        rotary="class",
        **COMMON,
    ),
    Family(
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        FULL | ROUTED | {"input_layernorm.weight": "h"},
        {"input_layernorm": QKV},
        lengths=FFN_WIDTH,
        requires={"num_shared_experts": (0, None)},
        parallel=True,
        layer_norm=True,
        rotary="class",
        logit_scale="logit_scale",
        experts=("num_experts",),
        **COMMON | {"fixed": WHOLE | {"attention_layers": "its attention and its experts read one norm"}},
    ),
    Family(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        FULL | QK_NORM_ALL | ROUTED | POST_NORMS,
        {"post_attention_layernorm": (), "post_feedforward_layernorm": ()},
        lengths=FFN_WIDTH,
        experts=("num_experts", "num_local_experts"),
        **COMMON,
    ),
    Family(
        "flint",
        "FlintForCausalLM",
        FULL | QK_NORM | {"self_attn.sinks": "n"} | ROUTED | shared("mlp.shared_expert", "y") | GATED | NORMS,
        PRE,
        **LISTED | {"lengths": ONE_SHARED, "optional": (*DENSE_OR_SPARSE, "mlp.shared_expert.")},
        requires={"decoder_sparse_step": (1, None)},
        disk=((".softmax_offset", ".sinks"),),
        layer_indices=("mlp_only_layers",),
        experts=("num_experts",),
        rotary="class",
    ),
    Family(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        FULL
        | GRANITE_EXPERTS
        | {"shared_mlp.input_linear.weight": "f h + f h", "shared_mlp.output_linear.weight": "h f"}
        | NORMS,
        {"input_layernorm": QKV, "post_attention_layernorm": ("shared_mlp.input_linear",)},
        fields={"neurons": "shared_intermediate_size"},
        lengths=FFN_WIDTH,
        experts=("num_local_experts",),
        expert_module="block_sparse_moe.experts",
        top_k="num_experts_per_tok",
        logit_divisor="logits_scaling",
    ),
    Family(
        "granitemoe_swa",
        "GraniteMoeSWAForCausalLM",
        FULL
        | {
            "self_attn.sinks": "n",
            "block_sparse_moe.router.weight": "e h",
            "block_sparse_moe.experts.gate_up_proj": "e (2 x) h",
            "block_sparse_moe.experts.down_proj": "e h x",
        }
        | NORMS,
        PRE,
        optional=("self_attn.sinks",),
        lengths=FFN_WIDTH,
        requires={"shared_intermediate_size": (0, None)},
        experts=("num_local_experts",),
        expert_module="block_sparse_moe.experts",
        logit_divisor="logits_scaling",
        **COMMON,
    ),
    Family(
        "aria_text",
        "AriaTextForCausalLM",
        FULL
        | {"mlp.router.weight": "e h", "mlp.experts.fc1.weight": "e h (2 x)", "mlp.experts.fc2.weight": "e x h"}
        | shared("mlp.shared_experts", "y")
        | NORMS,
        PRE,
        lengths=FFN_WIDTH | {"y": ("intermediate_size*moe_num_shared_experts",)},
        experts=("moe_num_experts",),
        top_k="moe_topk",
        fixed=WHOLE,
    ),
    Family(
        "mellum",
        "MellumForCausalLM",
        FULL | QK_NORM | ROUTED | GATED | NORMS,
        PRE,
        **LISTED,
        experts=("num_local_experts", "num_experts"),
        rotary="class",
    ),
    Family(
        "laguna",
        "LagunaForCausalLM",
        FULL
        | QK_NORM
        | {"self_attn.g_proj.weight": "n h", "mlp.experts.e_score_correction_bias": "e"}
        | ROUTED
        | shared("mlp.shared_expert", "y")
        | GATED
        | NORMS,
        PRE | {"input_layernorm": (*QKV, "self_attn.g_proj")},
        **LISTED
        | {
            "lengths": ONE_SHARED,
            "optional": (*DENSE_OR_SPARSE, "mlp.shared_expert."),
            "fixed": WHOLE | {"heads": HEADS_LISTED, "groups": HEADS_LISTED},
        },
        shared_module="mlp.shared_experts.down_proj",
        experts=("num_experts",),
        rotary="class",
    ),
    Family(
        "hy_v3",
        "HYV3ForCausalLM",
        FULL
        | QK_NORM
        | experts(NAMED, "x", "mlp.router.gate.weight")
        | shared("mlp.shared_mlp", "y")
        | {"mlp.expert_bias": "e"}
        | GATED
        | NORMS,
        PRE,
        **LISTED
        | {
            "lengths": SHARED_WIDTH,
            "optional": (*DENSE_OR_SPARSE, "mlp.shared_mlp.", "mlp.router.", "mlp.expert_bias"),
        },
        shared_module="mlp.shared_experts.down_proj",
        experts=("num_experts",),
    ),
    Family(
        "minimax_m3_vl_text",
        "MiniMaxM3VLForCausalLM",
        FULL
        | QK_NORM
        | {
            "mlp.gate.weight": "e h",
            "mlp.gate.e_score_correction_bias": "e",
            "mlp.experts.gate_up_proj": "e (2 x) h",
            "mlp.experts.down_proj": "e h x",
            "mlp.shared_experts.gate_up_proj.weight": "(2 y) h",
            "mlp.shared_experts.down_proj.weight": "h y",
        }
        | NORMS,
        PRE,
        lengths=FFN_WIDTH | {"y": ("shared_intermediate_size",)},
        experts=("num_local_experts",),
        norm_offset=1.0,
        rotary="class",
        **COMMON,
    ),
)
