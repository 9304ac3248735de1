"""Gemma 4: head sizes by layer type, last layers that reuse keys, embeddings of each layer, experts beside the FFN.

Axes of its own: `q` query heads times head size, `j` KV heads times head size, `i` head size, each by layer; `p` the
width of a layer's own embedding.
"""

from dataclasses import replace

from pipeline.model.families.experts import EXPERT_WIDTH
from pipeline.model.families.table import ATTENTION_BIASES, GATE_UP, GATED, QKV, Family

OWN_HEADS = "its head size and its KV heads differ by layer type"
EMBEDDED = {
    "per_layer_input_gate.weight": "p h",
    "per_layer_projection.weight": "h p",
    "post_per_layer_input_norm.weight": "h",
}
OUTER = {
    "model.embed_tokens_per_layer.weight": "v (L p)",
    "model.per_layer_model_projection.weight": "(L p) h",
    "model.per_layer_projection_norm.weight": "p",
}
SPARSE = {
    "router.proj.weight": "e h",
    "router.scale": "h",
    "router.per_expert_scale": "e",
    "experts.gate_up_proj": "e (2 x) h",
    "experts.down_proj": "e h x",
    "pre_feedforward_layernorm_2.weight": "h",
    "post_feedforward_layernorm_1.weight": "h",
    "post_feedforward_layernorm_2.weight": "h",
}
KEYS = ("self_attn.k_proj.", "self_attn.v_proj.", "self_attn.k_norm.")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
GLOBAL = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
LENGTHS = {
    "q": ("num_attention_heads*head_dim",),
    "j": ("num_key_value_heads*head_dim",),
    "i": ("head_dim",),
}

JOINT_NORMS = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_2", "post_feedforward_layernorm")
TABLE = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    {
        "self_attn.q_proj.weight": "q h",
        "self_attn.k_proj.weight": "j h",
        "self_attn.v_proj.weight": "j h",
        "self_attn.o_proj.weight": "h q",
        "self_attn.q_norm.weight": "i",
        "self_attn.k_norm.weight": "i",
        "layer_scalar": "1",
    }
    | dict(zip(ATTENTION_BIASES, ("q", "j", "j", "h"), strict=True))
    | GATED
    | {f"{name}.weight": "h" for name in NORMS},
    {"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP},
    {"post_attention_layernorm": "self_attn.o_proj", "post_feedforward_layernorm": "mlp.down_proj"},
    optional=KEYS,
    lengths=LENGTHS,
    layer_fields="per_layer_config",
    shared_fields=GLOBAL,
    superseded=tuple(GLOBAL.values()),
    reused=KEYS,
    reusing="num_kv_shared_layers",
    double_wide="use_double_wide_mlp",
    residual_weights=True,
    keeps_last="the class makes its last layer one of full attention",
    rotary="class",
    embedding_times_root_hidden=True,
    fixed={"heads": OWN_HEADS, "groups": OWN_HEADS},
)


def with_embeddings(table: Family) -> Family:
    """Return the table of the same model with an embedding for each layer."""
    return replace(
        table,
        layer=dict(table.layer) | EMBEDDED,
        post_norms=dict(table.post_norms) | {"post_per_layer_input_norm": "per_layer_projection"},
        outer=OUTER,
        lengths=dict(table.lengths) | {"p": ("hidden_size_per_layer_input",)},
        follows={"vocab_size_per_layer_input": "vocabulary"},
        divided_by_root_hidden=(*table.divided_by_root_hidden, "model.per_layer_model_projection.weight"),
    )


def with_experts(table: Family) -> Family:
    """Return the table of the same model with experts beside the FFN of each layer."""
    return replace(
        table,
        layer=dict(table.layer) | SPARSE,
        pre_norms=dict(table.pre_norms) | dict.fromkeys(JOINT_NORMS, ()) | {"router.norm": ("router.proj",)},
        post_norms={norm: writer for norm, writer in table.post_norms.items() if norm not in JOINT_NORMS}
        | {"post_feedforward_layernorm_1": "mlp.down_proj"},
        lengths=dict(table.lengths) | EXPERT_WIDTH,
        divided_by_root_hidden=(*table.divided_by_root_hidden, "router.scale"),
        experts=("num_experts",),
        expert_module="experts",
        top_k="top_k_experts",
        fixed=dict(table.fixed) | {"ffn_layers": "its FFN and its experts are added under one norm"},
    )


DENSE, UNEMBEDDED = {"enable_moe_block": (False, None)}, {"hidden_size_per_layer_input": (0, None)}
GEMMA4 = (
    replace(
        with_experts(with_embeddings(TABLE)),
        variants=(
            replace(TABLE, requires=DENSE | UNEMBEDDED),
            replace(with_embeddings(TABLE), requires=DENSE),
            replace(with_experts(TABLE), requires=UNEMBEDDED),
        ),
    ),
    replace(TABLE, model_type="gemma4_unified_text", architecture="Gemma4UnifiedForCausalLM"),
)
