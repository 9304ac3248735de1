"""Llama 4: experts that read the hidden states times the router's weight, beside one shared expert, in some layers."""

from pipeline.model.families.experts import COMMON, PRE, shared
from pipeline.model.families.table import ATTENTION, ATTENTION_BIASES, NORMS, Family

DENSE = {f"feed_forward.{name}_proj.weight": axes for name, axes in (("gate", "f h"), ("up", "f h"), ("down", "h f"))}
SPARSE = {
    "feed_forward.router.weight": "e h",
    "feed_forward.experts.gate_up_proj": "e h (2 x)",
    "feed_forward.experts.down_proj": "e x h",
}

LLAMA4 = (
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        ATTENTION | ATTENTION_BIASES | SPARSE | shared("feed_forward.shared_expert", "y") | DENSE | NORMS,
        PRE,
        ffn="feed_forward",
        optional=(
            *(name.removesuffix("weight") for name in DENSE),
            "feed_forward.router.",
            "feed_forward.experts.",
            "feed_forward.shared_expert.",
        ),
        fields={"neurons": "intermediate_size_mlp"},
        lengths={"x": ("intermediate_size",), "y": ("intermediate_size",)},
        layer_indices=("moe_layers",),
        experts=("num_local_experts",),
        expert_module="feed_forward.experts",
        scaled_inputs=True,
        rotary="interleave",
        **COMMON,
    ),
)
