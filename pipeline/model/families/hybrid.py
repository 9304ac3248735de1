"""Hybrids: some layers have attention, others a state-space model, linear attention or a convolution.

The tensors of each kind of layer are optional in the table: a layer has those of its kind. What is not attention is
carried whole, on axes of its own.
"""

from dataclasses import replace
from typing import Any

from pipeline.model.families.experts import EXPERT_WIDTH, FFN_WIDTH, GRANITE_EXPERTS, NAMED, WHOLE, experts, shared
from pipeline.model.families.table import (
    ATTENTION,
    ATTENTION_BIASES,
    GATE_UP,
    GATED,
    GATED_BIASES,
    NORMS,
    PLAIN,
    PLAIN_BIASES,
    QK_NORM,
    QKV,
    Family,
)

KINDS = "its layers of other kinds have no heads of attention to cut beside"
WIDE = "its other layers are as wide as a multiple of the hidden size"
CARRIED = {"heads": KINDS, "groups": KINDS}
FF = {name.replace("mlp.", "feed_forward."): axes for name, axes in GATED.items()}
FF_NORMS = {"input_layernorm.weight": "h", "pre_ff_layernorm.weight": "h"}
FF_READERS = ("feed_forward.gate_proj", "feed_forward.up_proj")

MAMBA = {
    "mamba.in_proj.weight": "i h",
    "mamba.in_proj.bias": "i",
    "mamba.conv1d.weight": "c 1 l",
    "mamba.conv1d.bias": "c",
    "mamba.A_log": "m",
    "mamba.D": "m",
    "mamba.dt_bias": "m",
    "mamba.norm.weight": "s",
    "mamba.out_proj.weight": "h s",
    "mamba.out_proj.bias": "h",
}


def mamba_lengths(width: str) -> dict[str, tuple[str, ...]]:
    """Return the lengths of the axes of MAMBA, where `width` is the product of fields that a state-space model is."""
    states = "mamba_n_groups*mamba_d_state*2"
    return {
        "i": (f"{width}*2", states, "mamba_n_heads"),
        "c": (width, states),
        "m": ("mamba_n_heads",),
        "s": (width,),
        "l": ("mamba_d_conv",),
    }


LINEAR = {
    "linear_attn.conv1d.weight": "c 1 l",
    "linear_attn.A_log": "m",
    "linear_attn.dt_bias": "m",
    "linear_attn.norm.weight": "g",
    "linear_attn.out_proj.weight": "h z",
}
LINEAR_PARTS = {f"linear_attn.in_proj_{name}.weight": f"{axis} h" for name, axis in zip(("qkv", "z", "b", "a"), "czmm")}
LINEAR_FUSED = {"linear_attn.in_proj_qkvz.weight": "j h", "linear_attn.in_proj_ba.weight": "(2 m) h"}
KEYS, VALUES = "linear_num_key_heads*linear_key_head_dim*2", "linear_num_value_heads*linear_value_head_dim"
LINEAR_LENGTHS = {
    "c": (KEYS, VALUES),
    "j": (KEYS, f"{VALUES}*2"),
    "z": (VALUES,),
    "m": ("linear_num_value_heads",),
    "g": ("linear_value_head_dim",),
    "l": ("linear_conv_kernel_dim",),
}
GATED_ATTENTION = ATTENTION | ATTENTION_BIASES | QK_NORM | {"self_attn.q_proj.weight": "(n 2 d) h"}
LINEAR_READERS = QKV + tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a", "qkvz", "ba"))
MIXTURE = (
    experts(NAMED, "x", "mlp.gate.weight") | shared("mlp.shared_expert", "y") | {"mlp.shared_expert_gate.weight": "1 h"}
)
MIXTURE_FIELDS: dict[str, Any] = {
    "lengths": LINEAR_LENGTHS | EXPERT_WIDTH | {"y": ("shared_expert_intermediate_size",)},
    "experts": ("num_experts", "num_local_experts"),
    "top_k": "num_experts_per_tok",
    "fixed": CARRIED | WHOLE,
}
QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    GATED_ATTENTION | LINEAR | LINEAR_PARTS | GATED | NORMS,
    {"input_layernorm": LINEAR_READERS, "post_attention_layernorm": GATE_UP},
    optional=("self_attn.", "linear_attn."),
    lengths=LINEAR_LENGTHS,
    fixed=CARRIED,
    norm_offset=1.0,
)
SHORT = {
    "conv.conv.weight": "h 1 l",
    "conv.conv.bias": "h",
    "conv.in_proj.weight": "(3 h) h",
    "conv.in_proj.bias": "(3 h)",
    "conv.out_proj.weight": "h h",
    "conv.out_proj.bias": "h",
}
SHORT_FIXED = CARRIED | {"hidden": "its convolutions have a channel for each hidden channel"}
LFM = {"feed_forward.w1.weight": "f h", "feed_forward.w3.weight": "f h", "feed_forward.w2.weight": "h f"}
LFM_ROUTER = "feed_forward.gate.weight"
LFM_NORMS = {"operator_norm.weight": "h", "ffn_norm.weight": "h"}
LFM_PRE = {
    "operator_norm": (*QKV, "conv.in_proj"),
    "ffn_norm": ("feed_forward.w1", "feed_forward.w3"),
}
LFM2 = Family(
    "lfm2",
    "Lfm2ForCausalLM",
    {name.replace("o_proj", "out_proj"): axes for name, axes in (ATTENTION | ATTENTION_BIASES).items()}
    | {"self_attn.q_layernorm.weight": "d", "self_attn.k_layernorm.weight": "d"}
    | SHORT
    | LFM
    | LFM_NORMS,
    LFM_PRE,
    final_norm="model.embedding_norm",
    optional=("self_attn.", "conv."),
    fields={"head_size": None},
    lengths={"l": ("conv_L_cache",)},
    adjusted=("block_auto_adjust_ff_dim", "feed_forward.w1.weight"),
    superseded=("block_ff_dim", "full_attn_idxs"),
    ffn="feed_forward",
    fixed=SHORT_FIXED,
)

GRANITE_HYBRID = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    ATTENTION
    | ATTENTION_BIASES
    | MAMBA
    | {"shared_mlp.input_linear.weight": "f h + f h", "shared_mlp.output_linear.weight": "h f"}
    | NORMS,
    {"input_layernorm": (*QKV, "mamba.in_proj"), "post_attention_layernorm": ("shared_mlp.input_linear",)},
    ffn="shared_mlp",
    optional=("self_attn.", "mamba."),
    fields={"head_size": None, "neurons": "shared_intermediate_size"},
    lengths=mamba_lengths("mamba_expand*hidden_size"),
    requires={"num_local_experts": (0,)},
    fixed=CARRIED | {"hidden": WIDE},
    logit_divisor="logits_scaling",
)

HYBRID = (
    QWEN3_5,
    replace(
        QWEN3_5,
        model_type="qwen3_next",
        architecture="Qwen3NextForCausalLM",
        layer=GATED_ATTENTION | LINEAR | LINEAR_FUSED | MIXTURE | NORMS,
        pre_norms={"input_layernorm": LINEAR_READERS, "post_attention_layernorm": ()},
        requires={"decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)},
        **MIXTURE_FIELDS,
    ),
    replace(
        QWEN3_5,
        model_type="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        layer=GATED_ATTENTION | LINEAR | LINEAR_PARTS | MIXTURE | NORMS,
        pre_norms={"input_layernorm": LINEAR_READERS, "post_attention_layernorm": ()},
        **MIXTURE_FIELDS,
    ),
    Family(
        "falcon_h1",
        "FalconH1ForCausalLM",
        ATTENTION | ATTENTION_BIASES | MAMBA | FF | FF_NORMS,
        {"input_layernorm": (*QKV, "mamba.in_proj"), "pre_ff_layernorm": FF_READERS},
        ffn="feed_forward",
        final_norm="model.final_layernorm",
        tuples=True,
        optional=("mamba.norm.",),
        lengths=mamba_lengths("mamba_d_ssm"),
        requires={"projectors_bias": (False, None), "mlp_bias": (False, None)},
        fixed=CARRIED,
        logit_scale="lm_head_multiplier",
    ),
    Family(
        "bamba",
        "BambaForCausalLM",
        ATTENTION | ATTENTION_BIASES | MAMBA | FF | FF_NORMS,
        {"input_layernorm": (*QKV, "mamba.in_proj"), "pre_ff_layernorm": FF_READERS},
        ffn="feed_forward",
        final_norm="model.final_layernorm",
        tuples=True,
        optional=("self_attn.", "mamba."),
        fields={"head_size": None},
        lengths=mamba_lengths("mamba_expand*hidden_size"),
        layer_indices=("attn_layer_indices",),
        fixed=CARRIED | {"hidden": WIDE},
    ),
    replace(
        GRANITE_HYBRID,
        layer=dict(GRANITE_HYBRID.layer) | GRANITE_EXPERTS,
        lengths=dict(GRANITE_HYBRID.lengths) | FFN_WIDTH,
        requires={},
        fixed=dict(GRANITE_HYBRID.fixed) | {"ffn_layers": "its FFN and its experts read one norm"},
        experts=("num_local_experts",),
        expert_module="block_sparse_moe.experts",
        top_k="num_experts_per_tok",
        variants=(GRANITE_HYBRID,),
    ),
    LFM2,
    replace(
        LFM2,
        model_type="lfm2_moe",
        architecture="Lfm2MoeForCausalLM",
        layer=dict(LFM2.layer)
        | experts(tuple(f"feed_forward.experts.{{expert}}.{name}" for name in ("w1", "w3", "w2")), "x", LFM_ROUTER)
        | {"feed_forward.expert_bias": "e"},
        pre_norms=LFM_PRE | {"ffn_norm": ()},
        optional=("self_attn.", "conv.", "feed_forward.w", "feed_forward.experts.", LFM_ROUTER, "feed_forward.expert_"),
        lengths=EXPERT_WIDTH | {"l": ("conv_L_cache",)},
        adjusted=None,
        superseded=(),
        leading_dense="num_dense_layers",
        experts=("num_experts",),
        expert_module="feed_forward.experts",
        top_k="num_experts_per_tok",
        fixed=SHORT_FIXED | WHOLE,
    ),
    Family(
        "lfm3",
        "Lfm3ForCausalLM",
        ATTENTION
        | QK_NORM
        | {"self_attn.g_proj.weight": "n h"}
        | SHORT
        | LFM
        | LFM_NORMS
        | {"post_operator_norm.weight": "h", "post_ffn_norm.weight": "h"},
        LFM_PRE | {"post_operator_norm": (), "post_ffn_norm": ()},
        final_norm="model.embedding_norm",
        disk=((".self_attn.gate_proj.", ".self_attn.g_proj."),),
        optional=("self_attn.g_proj.", "self_attn.", "conv."),
        ffn="feed_forward",
        lengths={"l": ("conv_L_cache",)},
        fixed=SHORT_FIXED,
    ),
    Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        {name.replace("self_attn.", "mixer."): axes for name, axes in (ATTENTION | ATTENTION_BIASES).items()}
        | {name.replace("mamba.", "mixer."): axes for name, axes in MAMBA.items() if "out_proj" not in name}
        | {"mixer.out_proj.weight": "h s", "mixer.out_proj.bias": "h"}
        | {name.replace("mlp.", "mixer."): axes for name, axes in (PLAIN | PLAIN_BIASES).items()}
        | {"norm.weight": "h"},
        {"norm": tuple(f"mixer.{name}_proj" for name in ("q", "k", "v", "in", "up"))},
        embedding="model.embeddings",
        final_norm="model.norm_f",
        attention="mixer",
        disk=(("backbone.", "model."),),
        optional=tuple(
            f"mixer.{name}"
            for name in ("q_proj.", "k_proj.", "v_proj.", "o_proj.", "up_proj.", "down_proj.", "in_proj.", "conv1d.")
        )
        + ("mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.norm.", "mixer.out_proj."),
        lengths={
            "i": ("mamba_num_heads*mamba_head_dim*2", "n_groups*ssm_state_size*2", "mamba_num_heads"),
            "c": ("mamba_num_heads*mamba_head_dim", "n_groups*ssm_state_size*2"),
            "m": ("mamba_num_heads",),
            "s": ("mamba_num_heads*mamba_head_dim",),
            "l": ("conv_kernel",),
        },
        layer_list="layers_block_type",
        superseded=("hybrid_override_pattern",),
        fixed=CARRIED,
    ),
    Family(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {name.replace("self_attn.", "temporal_block."): axes for name, axes in (ATTENTION | ATTENTION_BIASES).items()}
        | {
            f"temporal_block.linear_{name}.{kind}": axes
            for name, pair in (("x", ("w h", "w")), ("y", ("w h", "w")), ("out", ("h w", "h")))
            for kind, axes in zip(("weight", "bias"), pair)
        }
        | {
            "temporal_block.conv_1d.weight": "w 1 l",
            "temporal_block.conv_1d.bias": "w",
            "temporal_block.rg_lru.recurrent_param": "w",
        }
        | {
            f"temporal_block.rg_lru.{gate}_gate_{kind}": axes
            for gate in ("input", "recurrent")
            for kind, axes in (("weight", "n d d"), ("bias", "n d"))
        }
        | {name.replace("mlp.", "mlp_block."): axes for name, axes in (GATED | GATED_BIASES).items()}
        | {"temporal_pre_norm.weight": "h", "channel_pre_norm.weight": "h"},
        {
            "temporal_pre_norm": tuple(
                f"temporal_block.{name}" for name in ("q_proj", "k_proj", "v_proj", "linear_x", "linear_y")
            ),
            "channel_pre_norm": ("mlp_block.gate_proj", "mlp_block.up_proj"),
        },
        final_norm="model.final_norm",
        attention="temporal_block",
        ffn="mlp_block",
        optional=tuple(
            f"temporal_block.{name}" for name in ("q_proj.", "k_proj.", "v_proj.", "o_proj.", "linear_", "conv_1d.")
        )
        + ("temporal_block.rg_lru.",),
        fields={"head_size": None},
        lengths={"w": ("lru_width",), "l": ("conv1d_width",)},
        repeated=("block_types",),
        stated_neurons=2,
        norm_offset=1.0,
        embedding_times_root_hidden=True,
        logit_cap="logits_soft_cap",
        rotary="class",
        fixed=CARRIED | {"hidden": "its recurrent layers are as wide as the hidden size"},
    ),
)
