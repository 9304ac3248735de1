"""Kimi Linear: layers of low-rank attention among layers of gated delta attention, and experts from the second on.

Both kinds of layers have `q_proj` and `o_proj`, of other widths: the axes `a`, queries, and `b`, what is written,
differ by layer type. `z` are all channels of delta attention, `g` those of a head, `m` its heads.
"""

from pipeline.model.families.experts import (
    DENSE_FIRST,
    LOW_RANK,
    MIXTRAL,
    MLA,
    MLA_LENGTHS,
    PRE,
    WHOLE,
    experts,
    shared,
)
from pipeline.model.families.hybrid import KINDS
from pipeline.model.families.table import GATED, NORMS, Family

CHANNELS = "linear_num_heads*linear_head_dim"
DELTA = {
    "self_attn.k_proj.weight": "z h",
    "self_attn.v_proj.weight": "z h",
    "self_attn.b_proj.weight": "m h",
    "self_attn.f_a_proj.weight": "g h",
    "self_attn.f_b_proj.weight": "z g",
    "self_attn.g_a_proj.weight": "g h",
    "self_attn.g_b_proj.weight": "z g",
    "self_attn.q_conv1d.weight": "z 1 l",
    "self_attn.k_conv1d.weight": "z 1 l",
    "self_attn.v_conv1d.weight": "z 1 l",
    "self_attn.A_log": "1 1 m 1",
    "self_attn.dt_bias": "z",
    "self_attn.o_norm.weight": "g",
}
LATENT = {name: axes for name, axes in MLA.items() if "bias" not in name}
READERS = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj")

KIMI_LINEAR = (
    Family(
        "kimi_linear",
        "KimiLinearForCausalLM",
        LATENT
        | {"self_attn.q_proj.weight": "a h", "self_attn.o_proj.weight": "h b"}
        | DELTA
        | experts(MIXTRAL, "x", "block_sparse_moe.gate.weight")
        | {"block_sparse_moe.gate.e_score_correction_bias": "e"}
        | shared("block_sparse_moe.shared_experts", "y")
        | GATED
        | NORMS,
        PRE | {"input_layernorm": tuple(f"self_attn.{name}" for name in READERS)},
        aliases=tuple((f"block_sparse_moe.{name}_proj.", f"mlp.{name}_proj.") for name in ("gate", "up", "down")),
        optional=(
            *DENSE_FIRST["optional"][:3],
            "block_sparse_moe.experts.",
            "block_sparse_moe.gate.",
            "block_sparse_moe.shared_experts.",
            *(f"self_attn.{name}." for name in ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj")),
            "self_attn.kv_",
            *(f"{name.rpartition('.')[0]}." if name.endswith("weight") else name for name in DELTA),
        ),
        lengths={axis: fields for axis, fields in MLA_LENGTHS.items() if axis != "u"}
        | {
            "a": ("num_attention_heads*qk_nope_head_dim", "num_attention_heads*qk_rope_head_dim"),
            "b": ("num_attention_heads*v_head_dim",),
            "z": (CHANNELS,),
            "g": ("linear_head_dim",),
            "m": ("linear_num_heads",),
            "l": ("linear_conv_kernel_dim",),
            "x": ("moe_intermediate_size",),
            "y": ("moe_intermediate_size*num_shared_experts",),
        },
        lengths_by_type={"linear_attention": {"a": (CHANNELS,), "b": (CHANNELS,)}},
        requires={"attention_bias": (False, None)},
        superseded=("linear_attn_config", "first_k_dense_replace"),
        experts=("num_experts", "num_local_experts"),
        shared_module="mlp.shared_experts.down_proj",
        top_k="num_experts_per_token",
        expert_groups="num_expert_group",
        chosen_groups="topk_group",
        rotary="class",
        fixed=WHOLE | {"heads": f"{LOW_RANK}, and {KINDS}", "groups": f"{LOW_RANK}, and {KINDS}"},
    ),
)
