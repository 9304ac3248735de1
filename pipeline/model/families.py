"""The families this project knows, as tables: every checkpoint tensor and the named axes of its shape.

Axes: `v` vocabulary, `h` hidden channels, `n` query heads, `k` key/value heads, `d` head size, `f` FFN neurons.
`(n d) h` is a matrix whose rows run over heads and head size and whose columns run over hidden channels;
`f h + f h` is two such blocks stacked by rows (a fused projection). A family is data; nothing else in the project
asks which family it handles.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

LAYER = "model.layers.{layer}."
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class Family:
    """One row of the table. `layer` maps tensor names inside a layer to axes; `pre_norms` maps a norm to the
    projections that read it; `post_norms` maps a norm to the projection whose output it normalises."""

    model_type: str
    architecture: str
    layer: Mapping[str, str]
    pre_norms: Mapping[str, tuple[str, ...]]
    post_norms: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0  # the checkpoint stores gain - offset
    rotary: str = "half"  # pairs of elements that a rotation mixes: half (i, i + d/2) | interleave (2i, 2i + 1)
    embedding_times_root_hidden: bool = False  # the model multiplies embeddings by sqrt(hidden size)
    folded: str | None = None  # model_type without post-norms, once they are absorbed
    even_heads: bool = False  # its config class refuses hidden sizes that are no multiple of the query heads
    uneven: str | None = None  # model_type of the same network, without biases, that accepts them

    @property
    def sandwich(self) -> bool:
        """Whether every sublayer is normalised before and after (Pangu Ultra's sandwich norm, Gemma 2/3, GLM-4)."""
        return bool(self.pre_norms and self.post_norms)


ATTENTION = {
    "self_attn.q_proj.weight": "(n d) h",
    "self_attn.k_proj.weight": "(k d) h",
    "self_attn.v_proj.weight": "(k d) h",
    "self_attn.o_proj.weight": "h (n d)",
}
ATTENTION_BIASES = {
    "self_attn.q_proj.bias": "(n d)",
    "self_attn.k_proj.bias": "(k d)",
    "self_attn.v_proj.bias": "(k d)",
    "self_attn.o_proj.bias": "h",
}
GATED = {"mlp.gate_proj.weight": "f h", "mlp.up_proj.weight": "f h", "mlp.down_proj.weight": "h f"}
GATED_BIASES = {"mlp.gate_proj.bias": "f", "mlp.up_proj.bias": "f", "mlp.down_proj.bias": "h"}
GATED_FUSED = {"mlp.gate_up_proj.weight": "f h + f h", "mlp.down_proj.weight": "h f"}
QK_NORM = {"self_attn.q_norm.weight": "d", "self_attn.k_norm.weight": "d"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
PRE = {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}
NORMS = {"input_layernorm.weight": "h", "post_attention_layernorm.weight": "h"}
GEMMA_NORMS = NORMS | {"pre_feedforward_layernorm.weight": "h", "post_feedforward_layernorm.weight": "h"}
GEMMA = {
    "pre_norms": {"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP},
    "post_norms": {
        "post_attention_layernorm": "self_attn.o_proj",
        "post_feedforward_layernorm": "mlp.down_proj",
    },
    "norm_offset": 1.0,
    "embedding_times_root_hidden": True,
    "even_heads": True,
}
GLM_PRE = {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_up_proj",)}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            ATTENTION | ATTENTION_BIASES | GATED | GATED_BIASES | NORMS,
            PRE,
            even_heads=True,
            uneven="mistral",
        ),
        Family("mistral", "MistralForCausalLM", ATTENTION | GATED | NORMS, PRE),
        Family("qwen2", "Qwen2ForCausalLM", ATTENTION | ATTENTION_BIASES | GATED | NORMS, PRE),
        Family("qwen3", "Qwen3ForCausalLM", ATTENTION | ATTENTION_BIASES | QK_NORM | GATED | NORMS, PRE),
        Family("gemma2", "Gemma2ForCausalLM", ATTENTION | ATTENTION_BIASES | GATED | GEMMA_NORMS, **GEMMA),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            ATTENTION | ATTENTION_BIASES | QK_NORM | GATED | GEMMA_NORMS,
            **GEMMA,
        ),
        Family(
            "glm",
            "GlmForCausalLM",
            ATTENTION | ATTENTION_BIASES | GATED_FUSED | NORMS,
            GLM_PRE,
            rotary="interleave",
        ),
        Family(
            "glm4",
            "Glm4ForCausalLM",
            ATTENTION
            | ATTENTION_BIASES
            | GATED_FUSED
            | NORMS
            | {"post_self_attn_layernorm.weight": "h", "post_mlp_layernorm.weight": "h"},
            GLM_PRE,
            {"post_self_attn_layernorm": "self_attn.o_proj", "post_mlp_layernorm": "mlp.down_proj"},
            rotary="interleave",
            folded="glm",
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            ATTENTION
            | ATTENTION_BIASES
            | GATED
            | {"self_attn.q_norm.weight": "(n d)", "self_attn.k_norm.weight": "(k d)"}
            | {"post_attention_layernorm.weight": "h", "post_feedforward_layernorm.weight": "h"},
            {},
            {"post_attention_layernorm": "self_attn.o_proj", "post_feedforward_layernorm": "mlp.down_proj"},
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            {"self_attn.qkv_proj.weight": "(n d) h + (k d) h + (k d) h", "self_attn.o_proj.weight": "h (n d)"}
            | GATED_FUSED
            | NORMS,
            {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
        ),
    )
}


def family_of(model_type: str) -> Family:
    """Give the table of a `config.json` model_type; ValueError says what a new table needs."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} has no table; known: {', '.join(FAMILIES)}. A new family needs, in "
            "pipeline/model/families.py: its layer's tensor names with their axes (v h n k d f), which projections "
            "each norm feeds or follows, and whether gains are stored as 1+w"
        )
    return FAMILIES[model_type]
