"""Dense decoders of the Llama kind: RMSNorm, rotary positions, gated FFN, separate or row-fused projections."""

from typing import Any

from pipeline.model.families.table import (
    ATTENTION,
    ATTENTION_BIASES,
    GATE_UP,
    GATED,
    GATED_FUSED,
    LLAMA,
    NORMS,
    POST,
    POST_NORMS,
    PRE,
    QK_NORM,
    QK_NORM_ALL,
    QKV,
    Family,
)

GEMMA_NORMS = NORMS | {"pre_feedforward_layernorm.weight": "h", "post_feedforward_layernorm.weight": "h"}
GEMMA_PRE = {"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP}
GEMMA: dict[str, Any] = {
    "pre_norms": GEMMA_PRE,
    "post_norms": POST,
    "norm_offset": 1.0,
    "embedding_times_root_hidden": True,
    "even_heads": True,
}
GLM = ATTENTION | ATTENTION_BIASES | GATED_FUSED | NORMS
GLM_PRE = {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_up_proj",)}

DENSE = (
    Family("llama", "LlamaForCausalLM", LLAMA, PRE, even_heads=True, uneven="mistral"),
    Family("mistral", "MistralForCausalLM", ATTENTION | GATED | NORMS, PRE),
    Family("qwen2", "Qwen2ForCausalLM", ATTENTION | ATTENTION_BIASES | GATED | NORMS, PRE),
    Family("qwen3", "Qwen3ForCausalLM", ATTENTION | ATTENTION_BIASES | QK_NORM | GATED | NORMS, PRE),
    Family(
        "gemma",
        "GemmaForCausalLM",
        ATTENTION | ATTENTION_BIASES | GATED | NORMS,
        PRE,
        norm_offset=1.0,
        embedding_times_root_hidden=True,
    ),
    Family("gemma2", "Gemma2ForCausalLM", ATTENTION | ATTENTION_BIASES | GATED | GEMMA_NORMS, **GEMMA),
    Family("gemma3_text", "Gemma3ForCausalLM", ATTENTION | ATTENTION_BIASES | QK_NORM | GATED | GEMMA_NORMS, **GEMMA),
    Family(
        "vaultgemma",
        "VaultGemmaForCausalLM",
        ATTENTION | ATTENTION_BIASES | GATED | {"input_layernorm.weight": "h", "pre_feedforward_layernorm.weight": "h"},
        GEMMA_PRE,
        norm_offset=1.0,
        embedding_times_root_hidden=True,
        even_heads=True,
    ),
    Family("glm", "GlmForCausalLM", GLM, GLM_PRE, rotary="interleave"),
    Family(
        "glm4",
        "Glm4ForCausalLM",
        GLM | {"post_self_attn_layernorm.weight": "h", "post_mlp_layernorm.weight": "h"},
        GLM_PRE,
        {"post_self_attn_layernorm": "self_attn.o_proj", "post_mlp_layernorm": "mlp.down_proj"},
        rotary="interleave",
        folded="glm",
    ),
    Family("olmo2", "Olmo2ForCausalLM", ATTENTION | ATTENTION_BIASES | GATED | QK_NORM_ALL | POST_NORMS, {}, POST),
    Family("olmo3", "Olmo3ForCausalLM", ATTENTION | ATTENTION_BIASES | GATED | QK_NORM_ALL | POST_NORMS, {}, POST),
    Family("exaone4", "Exaone4ForCausalLM", ATTENTION | QK_NORM | GATED | POST_NORMS, {}, POST),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        {"self_attn.qkv_proj.weight": "(n d) h + (k d) h + (k d) h", "self_attn.o_proj.weight": "h (n d)"}
        | GATED_FUSED
        | NORMS,
        {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
        whole_heads_ropes=("longrope",),
    ),
    Family("ministral", "MinistralForCausalLM", ATTENTION | GATED | NORMS, PRE),
    Family("ministral3", "Ministral3ForCausalLM", ATTENTION | GATED | NORMS, PRE),
    Family("smollm3", "SmolLM3ForCausalLM", LLAMA, PRE),
    Family("seed_oss", "SeedOssForCausalLM", LLAMA, PRE),
    Family("ernie4_5", "Ernie4_5ForCausalLM", LLAMA, PRE, rotary="interleave"),
    Family("granite", "GraniteForCausalLM", LLAMA, PRE, logit_divisor="logits_scaling"),
    Family(
        "granite_swa",
        "GraniteSWAForCausalLM",
        LLAMA | {"self_attn.sinks": "n"},
        PRE,
        optional=("self_attn.sinks",),
        logit_divisor="logits_scaling",
    ),
    Family("cwm", "CwmForCausalLM", LLAMA, PRE, even_heads=True),
    Family("internlm3", "LlamaForCausalLM", LLAMA, PRE, even_heads=True),
    Family("iquestcoder", "LlamaForCausalLM", LLAMA, PRE, even_heads=True),
    Family(
        "hyperclovax",
        "HyperCLOVAXForCausalLM",
        LLAMA | {"post_norm1.weight": "h", "post_norm2.weight": "h"},
        PRE,
        {"post_norm1": "self_attn.o_proj", "post_norm2": "mlp.down_proj"},
        even_heads=True,
        logit_scale="logits_scaling",
        requires={"use_post_norm": (True, None)},
        variants=(
            Family(
                "hyperclovax",
                "HyperCLOVAXForCausalLM",
                LLAMA,
                PRE,
                even_heads=True,
                logit_scale="logits_scaling",
                requires={"use_post_norm": (False,)},
            ),
        ),
    ),
    Family(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        LLAMA | {"self_attn.query_layernorm.weight": "d", "self_attn.key_layernorm.weight": "d"},
        PRE,
    ),
    Family("helium", "HeliumForCausalLM", LLAMA, PRE, whole_heads=True, rotary="interleave"),
    Family(
        "exaone",
        "LlamaForCausalLM",
        LLAMA,
        PRE,
        even_heads=True,
        disk=(
            ("transformer.wte.", "model.embed_tokens."),
            ("transformer.h.", "model.layers."),
            ("transformer.ln_f.", "model.norm."),
            (".attn.attention.", ".self_attn."),
            (".self_attn.out_proj.", ".self_attn.o_proj."),
            (".ln_1.", ".input_layernorm."),
            (".ln_2.", ".post_attention_layernorm."),
            (".mlp.c_fc_0.", ".mlp.gate_proj."),
            (".mlp.c_fc_1.", ".mlp.up_proj."),
            (".mlp.c_proj.", ".mlp.down_proj."),
        ),
    ),
)
