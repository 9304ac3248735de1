"""Dense decoders with queries, keys and values in one matrix: GPT-NeoX, BLOOM, Falcon, MPT."""

from dataclasses import replace

from pipeline.model.families.table import NO_HEAD_SIZE, NORM_BIASES, NORMS, Family

ALIBI = "its ALiBi slopes follow from the number of heads, so fewer heads get other slopes"
RESIDUAL = "its attention and FFN add the residual stream themselves"
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


def interleaved(attention: str) -> dict[str, str]:
    """Return the tensors of an attention whose queries, keys and values are interleaved by KV group."""
    return {
        f"{attention}.query_key_value.weight": "(k q+2 d) h",
        f"{attention}.query_key_value.bias": "(k q+2 d)",
        f"{attention}.dense.weight": "h (n d)",
        f"{attention}.dense.bias": "h",
    }


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
    parallel=True,
    layer_norm=True,
    whole_heads=True,
    groups=1,
    neurons_per_channel=4,
)
FALCON_LAYERS = interleaved("self_attention") | FOUR
FALCON_2 = {f"{norm}.{kind}": "h" for norm in ("ln_attn", "ln_mlp") for kind in ("weight", "bias")}

NEOX = Family(
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
    requires={"use_parallel_residual": (True, None)},
    parallel=True,
    layer_norm=True,
    whole_heads=True,
)

GPT_NEOX = (
    replace(NEOX, variants=(replace(NEOX, requires={"use_parallel_residual": (False,)}, parallel=False),)),
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
        fixed={"attention_layers": "its attention returns a bias that the layer adds"},
        layer_norm=True,
        whole_heads=True,
        neurons_per_channel=4,
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
        fixed={"heads": ALIBI, "groups": ALIBI, "hidden": "its class computes the head size as hidden size / heads"}
        | dict.fromkeys(("attention_layers", "ffn_layers"), RESIDUAL),
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
                parallel=False,
                groups=None,
            ),
        ),
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
        fixed={"heads": ALIBI, "groups": ALIBI, "hidden": "its class computes the head size as hidden size / heads"}
        | dict.fromkeys(("attention_layers", "ffn_layers"), RESIDUAL),
        layer_norm=True,
        whole_heads=True,
        neurons_per_channel=4,
    ),
)
