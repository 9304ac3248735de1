"""Dense decoders of the GPT line: GPT-2 and its descendants, GPT-J, CodeGen, GPT-Neo, CTRL."""

from dataclasses import replace
from typing import Any

from pipeline.model.families.table import NO_HEAD_SIZE, Family

LN_12 = {f"ln_{i}.{kind}": "h" for i in (1, 2) for kind in ("weight", "bias")}
GPT2_FIELDS = NO_HEAD_SIZE | {"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "neurons": "n_inner"}
GPT2_OUTER = {"transformer.wpe.weight": "p h", "transformer.ln_f.bias": "h"}
GPT2_NAMES: dict[str, Any] = {
    "prefix": "transformer.h.{layer}.",
    "embedding": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "attention": "attn",
}
STARCODER2 = {
    "mlp.c_fc.weight": "f h",
    "mlp.c_fc.bias": "f",
    "mlp.c_proj.weight": "h f",
    "mlp.c_proj.bias": "h",
}
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    {
        "attn.c_attn.weight": "h (n d) + h (k d) + h (k d)",
        "attn.c_attn.bias": "(n d) + (k d) + (k d)",
        "attn.c_proj.weight": "(n d) h",
        "attn.c_proj.bias": "h",
        "mlp.c_fc.weight": "h f",
        "mlp.c_fc.bias": "f",
        "mlp.c_proj.weight": "f h",
        "mlp.c_proj.bias": "h",
    }
    | LN_12,
    {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    outer=GPT2_OUTER,
    fields=GPT2_FIELDS,
    lengths={"p": ("n_positions",)},
    requires={"scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None)},
    left_out=(r"\.attn\.(masked_)?bias$",),
    transposed=True,
    layer_norm=True,
    whole_heads=True,
    neurons_per_channel=4,
    **GPT2_NAMES,
)
GPT_BIGCODE = Family(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    {
        "attn.c_attn.weight": "(n d) h + (k d) h + (k d) h",
        "attn.c_attn.bias": "(n d) + (k d) + (k d)",
        "attn.c_proj.weight": "h (n d)",
        "attn.c_proj.bias": "h",
    }
    | STARCODER2
    | LN_12,
    {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    outer=GPT2_OUTER,
    fields=GPT2_FIELDS,
    lengths={"p": ("n_positions",)},
    requires={"multi_query": (True, None), "add_cross_attention": (False, None)},
    layer_norm=True,
    whole_heads=True,
    groups=1,
    neurons_per_channel=4,
    **GPT2_NAMES,
)

GPT = (
    GPT2,
    replace(GPT2, model_type="gpt-sw3"),
    replace(
        GPT_BIGCODE,
        variants=(
            replace(
                GPT_BIGCODE,
                layer=dict(GPT_BIGCODE.layer) | {"attn.c_attn.weight": "(k q+2 d) h", "attn.c_attn.bias": "(k q+2 d)"},
                requires=dict(GPT_BIGCODE.requires) | {"multi_query": (False,)},
                groups=None,
            ),
        ),
    ),
    Family(
        "gptj",
        "GPTJForCausalLM",
        {
            "attn.q_proj.weight": "(n d) h",
            "attn.k_proj.weight": "(k d) h",
            "attn.v_proj.weight": "(k d) h",
            "attn.out_proj.weight": "h (n d)",
            "mlp.fc_in.weight": "f h",
            "mlp.fc_in.bias": "f",
            "mlp.fc_out.weight": "h f",
            "mlp.fc_out.bias": "h",
            "ln_1.weight": "h",
            "ln_1.bias": "h",
        },
        {"ln_1": ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")},
        outer={"transformer.ln_f.bias": "h", "lm_head.bias": "v"},
        fields=GPT2_FIELDS,
        parallel=True,
        left_out=(r"\.attn\.(masked_)?bias$",),
        layer_norm=True,
        whole_heads=True,
        neurons_per_channel=4,
        **GPT2_NAMES,
    ),
    Family(
        "codegen",
        "CodeGenForCausalLM",
        {
            "attn.qkv_proj.weight": "x h",
            "attn.out_proj.weight": "h y",
            "mlp.fc_in.weight": "f h",
            "mlp.fc_in.bias": "f",
            "mlp.fc_out.weight": "h f",
            "mlp.fc_out.bias": "h",
            "ln_1.weight": "h",
            "ln_1.bias": "h",
        },
        {"ln_1": ("attn.qkv_proj", "mlp.fc_in")},
        outer={"transformer.ln_f.bias": "h", "lm_head.bias": "v"},
        fields=GPT2_FIELDS,
        lengths={"x": ("n_embd", "n_embd", "n_embd"), "y": ("n_embd",)},
        fixed=dict.fromkeys(
            ("heads", "groups", "hidden"), "its queries, keys and values are interleaved in four blocks of heads"
        ),
        parallel=True,
        left_out=(r"\.attn\.causal_mask$",),
        layer_norm=True,
        whole_heads=True,
        neurons_per_channel=4,
        **GPT2_NAMES,
    ),
    Family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            f"attn.attention.{name}_proj.weight": axes
            for name, axes in (("q", "(n d) h"), ("k", "(k d) h"), ("v", "(k d) h"), ("out", "h (n d)"))
        }
        | {"attn.attention.out_proj.bias": "h"}
        | STARCODER2
        | LN_12,
        {"ln_1": tuple(f"attn.attention.{name}_proj" for name in "qkv"), "ln_2": ("mlp.c_fc",)},
        **GPT2_NAMES | {"attention": "attn.attention"},
        tuples=True,
        outer=GPT2_OUTER,
        fields=NO_HEAD_SIZE | {"layers": "num_layers", "heads": "num_heads"},
        lengths={"p": ("max_position_embeddings",)},
        layer_groups={"attention_types": "attention_layers"},
        left_out=(r"\.attention\.(masked_)?bias$",),
        layer_norm=True,
        whole_heads=True,
        neurons_per_channel=4,
    ),
    Family(
        "ctrl",
        "CTRLLMHeadModel",
        {
            f"multi_head_attention.W{x}.{kind}": axes
            for x, axis in zip("qkv", "nkk")
            for kind, axes in (("weight", f"({axis} d) h"), ("bias", f"({axis} d)"))
        }
        | {"multi_head_attention.dense.weight": "h (n d)", "multi_head_attention.dense.bias": "h"}
        | {"ffn.0.weight": "f h", "ffn.0.bias": "f", "ffn.2.weight": "h f", "ffn.2.bias": "h"}
        | {f"layernorm{i}.{kind}": "h" for i in (1, 2) for kind in ("weight", "bias")},
        {
            "layernorm1": tuple(f"multi_head_attention.W{x}" for x in "qkv"),
            "layernorm2": ("ffn.0",),
        },
        prefix="transformer.h.{layer}.",
        embedding="transformer.w",
        final_norm="transformer.layernorm",
        attention="multi_head_attention",
        ffn="ffn",
        outer={"transformer.layernorm.bias": "h", "lm_head.bias": "v"},
        fields=NO_HEAD_SIZE | {"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "neurons": "dff"},
        fixed=dict.fromkeys(("hidden", "heads", "groups"), "its sinusoidal positions follow from the hidden size"),
        layer_norm=True,
        whole_heads=True,
    ),
)
