"""Tiny random image-text models of the real classes, and inputs with an image for each."""

import torch
import transformers
from transformers import AutoConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from pipeline.model.families import FAMILIES, WRAPPERS
from pipeline.runtime.wrapper import text_config
from tests.tiny import config_of
from tests.tiny_configs import BASE, FEW, GEMMA, LINEAR, TINY

IMAGE = 90  # the token id of an image patch
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CLIP = SIGLIP | {"model_type": "clip_vision_model", "num_hidden_layers": 2, "projection_dim": 8}
PIXTRAL = SIGLIP | {"model_type": "pixtral", "head_dim": 8, "image_size": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "patch_size": 4}
PATCHES = [[[x, y] for y in range(4) for x in range(4)]]
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}

# By model_type: fields of text_config beside BASE, of vision_config, and others; then the shape of pixel_values, the
# number of image tokens, and further inputs.
TINY_WRAPPERS: dict[str, tuple] = {
    "gemma3": (
        {"model_type": "gemma3_text", **GEMMA},
        SIGLIP,
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE},
        (1, 3, 8, 8),
        4,
        {},
    ),
    "gemma4": (
        {"model_type": "gemma4_text", **TINY["gemma4_text"]},
        SIGLIP
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "standardize": True,
        },
        {"image_token_id": IMAGE, "video_token_id": 91, "audio_token_id": 92},
        (1, 16, 48),
        4,
        {"image_position_ids": PATCHES},
    ),
    "gemma4_unified": (
        {"model_type": "gemma4_unified_text", **TINY["gemma4_unified_text"]},
        {"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 16, "output_proj_dims": 16, "mm_posemb_size": 16},
        {"image_token_id": IMAGE, "video_token_id": 91, "audio_token_id": 92},
        (1, 16, 48),
        16,
        {"image_position_ids": PATCHES},
    ),
    "mistral3": (
        {"model_type": "mistral"},
        PIXTRAL,
        {"image_token_index": IMAGE, "spatial_merge_size": 2, "tie_word_embeddings": False},
        (1, 3, 16, 16),
        4,
        {"image_sizes": [[16, 16]]},
    ),
    "llava": (
        {"model_type": "llama"},
        CLIP,
        {"image_token_index": IMAGE, "image_seq_length": 4},
        (1, 3, 8, 8),
        4,
        {},
    ),
    "llava_next": (
        {"model_type": "mistral"},
        CLIP,
        {"image_token_index": IMAGE, "image_grid_pinpoints": [[8, 16]]},
        (1, 3, 3, 8, 8),
        14,
        {"image_sizes": [[8, 16]]},
    ),
    "llama4": (
        {"model_type": "llama4_text", **TINY["llama4_text"]},
        SIGLIP
        | {
            "intermediate_size": 64,
            "image_size": 16,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 12,
            "projector_output_dim": 12,
            "vision_output_dim": 12,
        },
        {"image_token_index": IMAGE},
        (1, 3, 16, 16),
        4,
        {},
    ),
    "internvl": (
        {"model_type": "qwen2"},
        SIGLIP | {"image_size": [8, 8], "patch_size": [4, 4]},
        {"image_token_id": IMAGE, "image_seq_length": 1},
        (1, 3, 8, 8),
        1,
        {},
    ),
    "idefics3": (
        {"model_type": "llama"},
        SIGLIP,
        {"image_token_id": IMAGE, "scale_factor": 2},
        (1, 1, 3, 8, 8),
        1,
        {},
    ),
    "smolvlm": (
        {"model_type": "llama"},
        SIGLIP,
        {"image_token_id": IMAGE, "scale_factor": 2},
        (1, 1, 3, 8, 8),
        1,
        {},
    ),
    "qwen2_vl": (
        {"model_type": "qwen2_vl_text", **MROPE},
        QWEN | {"embed_dim": 16, "hidden_size": 32, "spatial_merge_size": 2, "mlp_ratio": 2},
        QWEN_IDS,
        (16, 96),
        4,
        {"image_grid_thw": [[1, 4, 4]]},
    ),
    "qwen2_5_vl": (
        {"model_type": "qwen2_5_vl_text", **MROPE},
        QWEN | {"out_hidden_size": 32, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0]},
        QWEN_IDS,
        (16, 96),
        4,
        {"image_grid_thw": [[1, 4, 4]]},
    ),
    "qwen3_vl": (
        {"model_type": "qwen3_vl_text", **MROPE},
        QWEN | {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        QWEN_IDS,
        (16, 96),
        4,
        {"image_grid_thw": [[1, 4, 4]]},
    ),
    "qwen3_5_moe": (
        {"model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 20, **LINEAR, **FEW, **MROPE},
        QWEN | {"out_hidden_size": 32, "num_position_embeddings": 16},
        QWEN_IDS,
        (16, 96),
        4,
        {"image_grid_thw": [[1, 4, 4]]},
    ),
    "qwen3_5": (
        {"model_type": "qwen3_5_text", **LINEAR, **MROPE},
        QWEN | {"out_hidden_size": 32, "num_position_embeddings": 16},
        QWEN_IDS,
        (16, 96),
        4,
        {"image_grid_thw": [[1, 4, 4]]},
    ),
}


def tiny_wrapper(kind: str, dtype: torch.dtype = torch.float64, **text):
    """Return a tiny image-text model in evaluation mode, every parameter drawn from a normal of deviation 0.3."""
    if kind == "llama4":  # whose class in transformers 5.24 reads a field that the output of its text half lacks
        MoeCausalLMOutputWithPast.image_outputs = None
    fields, vision, others, *_ = TINY_WRAPPERS[kind]
    config = AutoConfig.for_model(kind, text_config={**BASE, **fields, **text}, vision_config=vision, **others)
    config._attn_implementation = "eager"
    model = eager(getattr(transformers, WRAPPERS[kind].architecture)(config)).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # a complex buffer would lose its imaginary part
            tensor.data = tensor.data.to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def eager(model):
    """Return the model with its experts, if any, computed in the only way that accepts float64."""
    if any(".experts." in name for name, _ in model.named_parameters()):
        model.set_experts_implementation("eager")
    return model


def text_half(model):
    """Return the text half as a model of its own class, whose decoder and output matrix are the model's modules."""
    fields = text_config(config_of(model))
    config = AutoConfig.for_model(**fields)
    text = getattr(transformers, FAMILIES[fields["model_type"]].architecture)(config)
    body = model.get_decoder()
    text.model, text.lm_head = getattr(body, "model", body), model.get_output_embeddings()
    return text.to(model.dtype).eval()


def image_inputs(kind: str) -> dict[str, torch.Tensor]:
    """Return a text with an image in it: token ids [1, t], pixels, and what else the class reads."""
    *_, shape, count, others = TINY_WRAPPERS[kind]
    generator = torch.Generator().manual_seed(3)
    marks = ([92], [93]) if "image_grid_thw" in others else ([], [])
    ids = torch.tensor([[5, 6, 7, *marks[0], *[IMAGE] * count, *marks[1], 8, 9, 10]])
    inputs = {name: torch.tensor(value) for name, value in others.items()}
    if "image_grid_thw" in others:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    elif kind == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    return inputs | {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
