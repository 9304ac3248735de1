"""Image-text models as tables: a text model of `FAMILIES` beside a vision tower and a projector.

The text half is pruned and recovered as the text model that it is. The rest is carried whole, except for what writes to
the text model's hidden channels. Axes: `h` hidden channels of the text model, `u` units inside a projector, as many as
the class gives it hidden channels; any other letter is carried whole.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.model.families.table import Family

# Where the text half's layers, embedding and final norm are in a file, and its output matrix, in the order of search.
LAYOUTS = (
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
    ("model.text_model.", "lm_head."),
    ("model.", "lm_head."),
)
POSITIONS = ("mrope_section", "mrope_interleaved", "type")  # of rope_parameters: no effect on text


@dataclass(frozen=True)
class Wrapper:
    """One image-text model type as data. Names of tensors are the ends of those in a checkpoint."""

    model_type: str
    architecture: str
    writes: Mapping[str, str]  # tensors beside the text half that follow its hidden channels: axes; `*` is a number
    texts: Mapping[str, str] = field(default_factory=dict)  # model_type of text_config: that of the same text model
    follows: tuple[str, ...] = ()  # config fields that repeat the text half's hidden size, `section.field`
    whole_heads: bool = False  # the class computes the text half's head size as hidden size / query heads
    injects: str | None = None  # config field: a list with an entry for each first layer that image features enter at

    def axes(self, name: str) -> tuple[str, ...] | None:
        """Return the axes of a tensor beside the text half; None for one that is carried whole."""
        for end, axes in self.writes.items():
            if re.search(rf"(^|\.){re.escape(end).replace(re.escape('*'), '[0-9]+')}$", name):
                return tuple(axes.split())
        return None


def layout(names: Mapping[str, object]) -> tuple[str, str]:
    """Return the prefix of the text half in these tensor names, and that of its output matrix.

    ValueError where no layer of a text half is found.
    """
    for prefix, head in LAYOUTS:
        if any(name.startswith(f"{prefix}layers.0.") for name in names):
            return prefix, head
    tried = ", ".join(f"{prefix}layers.0" for prefix, _ in LAYOUTS)
    raise ValueError(f"the weights have no layers of a text model under the names of wrappers ({tried})")


def text_names(names: Mapping[str, object], family: Family) -> dict[str, str]:
    """Return the stored name of each tensor of the text half, by its name in the text model's class."""
    prefix, head = layout(names)
    base = family.prefix.partition(".")[0] + "."
    return {base + name.removeprefix(prefix): name for name in names if name.startswith(prefix)} | {
        f"{family.head}.{name.removeprefix(head)}": name for name in names if name.startswith(head)
    }


LINEAR_2 = {
    "multi_modal_projector.linear_1.weight": "u x",
    "multi_modal_projector.linear_1.bias": "u",
    "multi_modal_projector.linear_2.weight": "h u",
    "multi_modal_projector.linear_2.bias": "h",
}
QWEN2 = {"visual.merger.mlp.2.weight": "h x", "visual.merger.mlp.2.bias": "h"}
QWEN3 = {
    f"visual.{name}.linear_fc2.{kind}": axes
    for name in ("merger", "deepstack_merger_list.*")
    for kind, axes in (("weight", "h x"), ("bias", "h"))
}
QWEN3_5 = {name: axes for name, axes in QWEN3.items() if "deepstack" not in name}
OUT = ("vision_config.out_hidden_size",)
GEMMA4 = {"embedding_projection.weight": "h x"}  # of images and of sound
CONNECTOR = {"connector.modality_projection.proj.weight": "h x"}

WRAPPERS: Mapping[str, Wrapper] = {
    wrapper.model_type: wrapper
    for wrapper in (
        Wrapper(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            {"multi_modal_projector.mm_input_projection_weight": "x h"},
        ),
        Wrapper("gemma4", "Gemma4ForConditionalGeneration", GEMMA4),
        Wrapper("gemma4_unified", "Gemma4UnifiedForConditionalGeneration", GEMMA4),
        Wrapper("mistral3", "Mistral3ForConditionalGeneration", LINEAR_2),
        Wrapper("llava", "LlavaForConditionalGeneration", LINEAR_2),
        Wrapper("llava_next", "LlavaNextForConditionalGeneration", LINEAR_2 | {"image_newline": "h"}),
        Wrapper(
            "llama4",
            "Llama4ForConditionalGeneration",
            {"multi_modal_projector.linear_1.weight": "h x"},
            texts={"llama4_text": "llama4_text"},
        ),
        Wrapper("internvl", "InternVLForConditionalGeneration", LINEAR_2),
        Wrapper("idefics3", "Idefics3ForConditionalGeneration", CONNECTOR),
        Wrapper("smolvlm", "SmolVLMForConditionalGeneration", CONNECTOR),
        Wrapper(
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration",
            QWEN2,
            texts={"qwen2_vl_text": "qwen2"},
            follows=("vision_config.hidden_size",),
            whole_heads=True,
        ),
        Wrapper(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            QWEN2,
            texts={"qwen2_5_vl_text": "qwen2"},
            follows=OUT,
            whole_heads=True,
        ),
        Wrapper(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            QWEN3,
            texts={"qwen3_vl_text": "qwen3"},
            follows=OUT,
            injects="vision_config.deepstack_visual_indexes",
        ),
        Wrapper(
            "qwen3_5",
            "Qwen3_5ForConditionalGeneration",
            QWEN3_5,
            follows=OUT,
        ),
        Wrapper(
            "qwen3_5_moe",
            "Qwen3_5MoeForConditionalGeneration",
            QWEN3_5,
            follows=OUT,
        ),
    )
}
