"""Dense decoders of other kinds: LayerNorm, FFNs without a gate, parallel blocks, learned positions, other names."""

from dataclasses import replace

from pipeline.model.families.gpt import STARCODER2
from pipeline.model.families.gpt_neox import FOUR, FOUR_PRE, interleaved
from pipeline.model.families.table import (
    ATTENTION,
    ATTENTION_BIASES,
    GATE_UP,
    GATED,
    LLAMA,
    NO_HEAD_SIZE,
    NORM_BIASES,
    NORMS,
    PLAIN,
    PLAIN_BIASES,
    PRE,
    QK_NORM,
    QKV,
    Family,
)

FINAL_BIAS = {"model.norm.bias": "h"}
UP_PRE = {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.up_proj",)}
XIELU = {f"mlp.act_fn.{name}": axes for name, axes in (("alpha_p", "1"), ("alpha_n", "1"), ("beta", ""), ("eps", ""))}
FC = {"fc1.weight": "f h", "fc1.bias": "f", "fc2.weight": "h f", "fc2.bias": "h"}
OUT_PROJ = {name.replace("o_proj", "out_proj"): axes for name, axes in (ATTENTION | ATTENTION_BIASES).items()}
BART_NORMS = {
    f"{norm}.{kind}": "h" for norm in ("self_attn_layer_norm", "final_layer_norm") for kind in ("weight", "bias")
}
BART_PRE = {"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1",)}
STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    ATTENTION | ATTENTION_BIASES | GATED | NORMS | NORM_BIASES,
    PRE,
    outer=FINAL_BIAS,
    fields={"head_size": None},
    whole_heads=True,
    layer_norm=True,
    requires={"use_parallel_residual": (False, None), "qk_layernorm": (False, None)},
)
APERTUS = Family(
    "apertus",
    "ApertusForCausalLM",
    ATTENTION
    | ATTENTION_BIASES
    | QK_NORM
    | PLAIN
    | XIELU
    | {"attention_layernorm.weight": "h", "feedforward_layernorm.weight": "h"},
    {"attention_layernorm": QKV, "feedforward_layernorm": ("mlp.up_proj",)},
    optional=("mlp.act_fn.",),
)
COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    ATTENTION
    | ATTENTION_BIASES
    | GATED
    | {"input_layernorm.weight": "h", "self_attn.q_norm.weight": "n d", "self_attn.k_norm.weight": "k d"},
    {"input_layernorm": QKV + GATE_UP},
    optional=("self_attn.q_norm.", "self_attn.k_norm."),
    layer_norm=True,
    rotary="class",
    logit_scale="logit_scale",
    parallel=True,
)

OTHER = (
    Family(
        "arcee",
        "ArceeForCausalLM",
        ATTENTION | ATTENTION_BIASES | PLAIN | PLAIN_BIASES | NORMS,
        UP_PRE,
        even_heads=True,
    ),
    Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        ATTENTION | ATTENTION_BIASES | STARCODER2 | NORMS | NORM_BIASES,
        {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.c_fc",)},
        outer=FINAL_BIAS,
        layer_norm=True,
    ),
    Family(
        "nemotron",
        "NemotronForCausalLM",
        ATTENTION | ATTENTION_BIASES | PLAIN | PLAIN_BIASES | NORMS | NORM_BIASES,
        UP_PRE,
        outer=FINAL_BIAS,
        norm_offset=1.0,
        layer_norm=True,
    ),
    Family(
        "jais2",
        "Jais2ForCausalLM",
        ATTENTION | ATTENTION_BIASES | PLAIN | PLAIN_BIASES | NORMS | NORM_BIASES,
        UP_PRE,
        outer=FINAL_BIAS,
        layer_norm=True,
        even_heads=True,
    ),
    replace(
        STABLELM,
        variants=(
            replace(
                STABLELM,
                layer={n: a for n, a in STABLELM.layer.items() if not n.startswith("post_attention_layernorm")},
                pre_norms={"input_layernorm": QKV + GATE_UP},
                requires={"use_parallel_residual": (True,), "qk_layernorm": (False, None)},
                parallel=True,
            ),
        ),
    ),
    Family(
        "phi",
        "PhiForCausalLM",
        {name.replace("o_proj", "dense"): axes for name, axes in (ATTENTION | ATTENTION_BIASES).items()}
        | {f"mlp.{name}": axes for name, axes in FC.items()}
        | {"input_layernorm.weight": "h", "input_layernorm.bias": "h"},
        {"input_layernorm": (*QKV, "mlp.fc1")},
        final_norm="model.final_layernorm",
        outer={"model.final_layernorm.bias": "h", "lm_head.bias": "v"},
        requires={"qk_layernorm": (False, None)},
        parallel=True,
        layer_norm=True,
    ),
    Family(
        "persimmon",
        "PersimmonForCausalLM",
        interleaved("self_attn")
        | {f"self_attn.{norm}_layernorm.{kind}": "d" for norm in "qk" for kind in ("weight", "bias")}
        | FOUR
        | NORMS
        | NORM_BIASES,
        FOUR_PRE | {"input_layernorm": ("self_attn.query_key_value",)},
        final_norm="model.final_layernorm",
        outer={"model.final_layernorm.bias": "h"},
        optional=("self_attn.q_layernorm.", "self_attn.k_layernorm."),
        fields=NO_HEAD_SIZE,
        layer_norm=True,
        whole_heads=True,
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        OUT_PROJ | FC | BART_NORMS,
        BART_PRE,
        prefix="model.decoder.layers.{layer}.",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        outer={"model.decoder.final_layer_norm.bias": "h", "model.decoder.embed_positions.weight": "p h"},
        fields=NO_HEAD_SIZE | {"neurons": "ffn_dim"},
        lengths={"p": ("max_position_embeddings", "2")},
        follows={"word_embed_proj_dim": "hidden"},
        requires={"do_layer_norm_before": (True, None)},
        layer_norm=True,
        whole_heads=True,
    ),
    Family(
        "biogpt",
        "BioGptForCausalLM",
        OUT_PROJ | FC | BART_NORMS,
        BART_PRE,
        prefix="biogpt.layers.{layer}.",
        embedding="biogpt.embed_tokens",
        final_norm="biogpt.layer_norm",
        head="output_projection",
        outer={"biogpt.layer_norm.bias": "h", "biogpt.embed_positions.weight": "p h"},
        fields=NO_HEAD_SIZE,
        lengths={"p": ("max_position_embeddings", "2")},
        requires={"scale_embedding": (True, None)},
        embedding_times_root_hidden=True,
        layer_norm=True,
        whole_heads=True,
    ),
    Family(
        "xglm",
        "XGLMForCausalLM",
        OUT_PROJ | FC | BART_NORMS,
        BART_PRE,
        final_norm="model.layer_norm",
        outer={"model.layer_norm.bias": "h"},
        fields={"layers": "num_layers", "hidden": "d_model", "heads": "attention_heads", "neurons": "ffn_dim"}
        | NO_HEAD_SIZE,
        fixed=dict.fromkeys(("hidden", "heads", "groups"), "its sinusoidal positions follow from the hidden size"),
        left_out=(r"embed_positions\.weights$",),
        layer_norm=True,
        whole_heads=True,
    ),
    Family("olmo", "OlmoForCausalLM", ATTENTION | ATTENTION_BIASES | GATED, PRE, gainless=True, layer_norm=True),
    Family(
        "nanochat",
        "NanoChatForCausalLM",
        ATTENTION | ATTENTION_BIASES | {"mlp.fc1.weight": "f h", "mlp.fc2.weight": "h f"},
        {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.fc1",)},
        gainless=True,
        rotary="class",
    ),
    APERTUS,
    replace(APERTUS, model_type="apertus1p5_text", architecture="Apertus1p5TextForCausalLM"),
    COHERE,
    replace(COHERE, model_type="cohere2", architecture="Cohere2ForCausalLM"),
    Family(
        "doge",
        "DogeForCausalLM",
        LLAMA
        | QK_NORM
        | {
            "input_residual": "h",
            "post_attention_residual": "h",
            "self_attn.A": "k",
            "self_attn.dt_proj.weight": "k (k d)",
            "self_attn.dt_proj.bias": "k",
        },
        PRE,
        requires={"is_moe": (False, None)},
        residual_weights=True,
        fixed={"groups": "its dynamic mask is a projection of all values of a layer"},
    ),
)
