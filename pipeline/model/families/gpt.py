"""Dense decoders of the GPT line: GPT-2 and its descendants, GPT-NeoX, BLOOM, Falcon, MPT, CTRL."""

from dataclasses import replace
from typing import Any

from pipeline.model.families.table import NORM_BIASES, NORMS, Family

ALIBI = "its ALiBi slopes follow from the number of heads, so fewer heads get other slopes"
LN_12 = {f"ln_{i}.{kind}": "h" for i in (1, 2) for kind in ("weight", "bias")}
FOUR = {  # the FFN of GPT-NeoX, BLOOM, Falcon and Persimmon
    "mlp.dense_h_to_4h.weight": "f h",
    "mlp.dense_h_to_4h.bias": "f",
    "mlp.dense_4h_to_h.weight": "h f",
    "mlp.dense_4h_to_h.bias": "h",
}
FOUR_PRE = {
    "input_layernorm": ("attention.query_key_value",),
    "post_attention_layernorm": ("mlp.dense_h_to_4h",),
}
NO_HEAD_SIZE: dict[str, str | None] = {"groups": None, "head_size": None}
GPT2_FIELDS = NO_HEAD_SIZE | {"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "neurons": "n_inner"}
GPT2_OUTER = {"transformer.wpe.weight": "p h", "transformer.ln_f.bias": "h"}
GPT2_NAMES: dict[str, Any] = {
    "prefix": "transformer.h.{layer}.",
    "embedding": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "attention": "attn",
}


def interleaved(attention: str) -> dict[str, str]:
    """Return the tensors of an attention whose queries, keys and values are interleaved by KV group."""
    return {
        f"{attention}.query_key_value.weight": "(k q+2 d) h",
        f"{attention}.query_key_value.bias": "(k q+2 d)",
        f"{attention}.dense.weight": "h (n d)",
        f"{attention}.dense.bias": "h",
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
FALCON = Family(
    "falcon",
    "FalconForCausalLM",
    {
        "self_attention.query_key_value.weight": "(n d) h + (k d) h + (k d) h",
        "self_attention.query_key_value.bias": "(n d) + (k d) + (k d)",
        "self_attention.dense.weight": "h (n d)",
        "self_attention.dense.bias": "h",
        "input_layernorm.weight": "h",
        "input_layernorm.bias": "h",
    }
    | FOUR,
    {"input_layernorm": ("self_attention.query_key_value", "mlp.dense_h_to_4h")},
    prefix="transformer.h.{layer}.",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    attention="self_attention",
    tuples=True,
    outer={"transformer.ln_f.bias": "h"},
    fields=NO_HEAD_SIZE | {"neurons": "ffn_hidden_size"},
    requires={
        "new_decoder_architecture": (False, None),
        "multi_query": (True, None),
        "parallel_attn": (True, None),
        "alibi": (False, None),
    },
    layer_norm=True,
    whole_heads=True,
    groups=1,
    neurons_per_channel=4,
)
FALCON_LAYERS = interleaved("self_attention") | FOUR
FALCON_2 = {f"{norm}.{kind}": "h" for norm in ("ln_attn", "ln_mlp") for kind in ("weight", "bias")}

GPT = (
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        interleaved("attention") | FOUR | NORMS | NORM_BIASES,
        FOUR_PRE,
        prefix="gpt_neox.layers.{layer}.",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        disk=(("embed_out.", "lm_head."),),
        attention="attention",
        outer={"gpt_neox.final_layer_norm.bias": "h"},
        fields=NO_HEAD_SIZE,
        left_out=(r"\.attention\.(masked_)?bias$",),
        layer_norm=True,
        whole_heads=True,
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        interleaved("self_attention") | FOUR | NORMS | NORM_BIASES,
        FOUR_PRE | {"input_layernorm": ("self_attention.query_key_value",)},
        prefix="transformer.h.{layer}.",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        attention="self_attention",
        tuples=True,
        outer={
            "transformer.ln_f.bias": "h",
            "transformer.word_embeddings_layernorm.weight": "h",
            "transformer.word_embeddings_layernorm.bias": "h",
        },
        fields={"layers": "n_layer", "heads": "n_head", "neurons": None} | NO_HEAD_SIZE,
        fixed={"heads": ALIBI, "groups": ALIBI, "hidden": "its class computes the head size as hidden size / heads"},
        layer_norm=True,
        whole_heads=True,
        neurons_per_channel=4,
    ),
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
        left_out=(r"\.attn\.causal_mask$",),
        layer_norm=True,
        whole_heads=True,
        neurons_per_channel=4,
        **GPT2_NAMES,
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
        outer={"transformer.layernorm.bias": "h", "lm_head.bias": "v"},
        fields=NO_HEAD_SIZE | {"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "neurons": "dff"},
        fixed=dict.fromkeys(("hidden", "heads", "groups"), "its sinusoidal positions follow from the hidden size"),
        layer_norm=True,
        whole_heads=True,
    ),
    Family(
        "mpt",
        "MptForCausalLM",
        {
            "attn.Wqkv.weight": "(n d) h + (k d) h + (k d) h",
            "attn.out_proj.weight": "h (n d)",
            "ffn.up_proj.weight": "f h",
            "ffn.down_proj.weight": "h f",
            "norm_1.weight": "h",
            "norm_2.weight": "h",
        },
        {"norm_1": ("attn.Wqkv",), "norm_2": ("ffn.up_proj",)},
        prefix="transformer.blocks.{layer}.",
        embedding="transformer.wte",
        final_norm="transformer.norm_f",
        attention="attn",
        tuples=True,
        fields={"layers": "n_layers", "hidden": "d_model", "heads": "n_heads", "neurons": None} | NO_HEAD_SIZE,
        fixed={"heads": ALIBI, "groups": ALIBI, "hidden": "its class computes the head size as hidden size / heads"},
        layer_norm=True,
        whole_heads=True,
        neurons_per_channel=4,
    ),
    replace(
        FALCON,
        variants=(
            replace(
                FALCON,
                layer=FALCON_LAYERS | FALCON_2,
                pre_norms={"ln_attn": ("self_attention.query_key_value",), "ln_mlp": ("mlp.dense_h_to_4h",)},
                fields=dict(FALCON.fields) | {"groups": "num_kv_heads"},
                requires={
                    "new_decoder_architecture": (True,),
                    "num_ln_in_parallel_attn": (2, None),
                    "alibi": (False, None),
                },
                groups=None,
            ),
            replace(
                FALCON,
                layer=FALCON_LAYERS | {"input_layernorm.weight": "h", "input_layernorm.bias": "h"},
                fields=dict(FALCON.fields) | {"groups": "num_kv_heads"},
                requires={
                    "new_decoder_architecture": (True,),
                    "num_ln_in_parallel_attn": (1,),
                    "alibi": (False, None),
                },
                groups=None,
            ),
            replace(
                FALCON,
                layer=FALCON_LAYERS | NORMS | NORM_BIASES,
                pre_norms=FOUR_PRE | {"input_layernorm": ("self_attention.query_key_value",)},
                fields=dict(FALCON.fields) | {"groups": "num_kv_heads"},
                requires={
                    "new_decoder_architecture": (False, None),
                    "multi_query": (False,),
                    "parallel_attn": (False,),
                    "alibi": (False, None),
                },
                groups=None,
            ),
        ),
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
        "gpt_neox_japanese",
        "GPTNeoXJapaneseForCausalLM",
        {name: axes for name, axes in (interleaved("attention") | FOUR).items() if name.endswith("weight")}
        | {"attention.dense_bias": "h"}
        | NORMS
        | NORM_BIASES,
        FOUR_PRE,
        prefix="gpt_neox_japanese.layers.{layer}.",
        embedding="gpt_neox_japanese.embed_in",
        final_norm="gpt_neox_japanese.final_layer_norm",
        attention="attention",
        tuples=True,
        outer={"gpt_neox_japanese.final_layer_norm.bias": "h"},
        disk=(("embed_out.", "lm_head."),),
        optional=("attention.dense_bias",),
        fields=NO_HEAD_SIZE | {"neurons": None},
        requires={"intermediate_multiple_size": (4, None)},
        keeps_last="the bias of its attention's output is in the last layer only",
        layer_norm=True,
        whole_heads=True,
        neurons_per_channel=4,
    ),
)
