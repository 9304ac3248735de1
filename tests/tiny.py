"""Tiny random models of the real classes: every parameter random, also gains and biases, so that none hides in ones."""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from pipeline.model.anatomy import Anatomy
from pipeline.model.families import FAMILIES, Family, family_for
from pipeline.model.sizes import Sizes
from tests.tiny_configs import BASE, FLOAT32, TINY

REPRESENTATIVE = tuple(TINY)[:12]  # the kinds on which every method is tested


def model_type(kind: str) -> str:
    """Return the model_type of a kind."""
    return kind if kind in FAMILIES else kind.partition("-")[0]


def family(kind: str) -> Family:
    """Return the table of a kind, in the variant for its settings."""
    return family_for({**BASE, **TINY[kind], "model_type": model_type(kind)})


CLASSES = {
    kind: (type(AutoConfig.for_model(model_type(kind))).__name__, FAMILIES[model_type(kind)].architecture)
    for kind in REPRESENTATIVE
}


def tiny_config(kind: str, **changed):
    """Return the config of a tiny model of a kind, with some fields changed."""
    config_class = type(AutoConfig.for_model(model_type(kind)))
    fields = {**BASE, **TINY[kind], **changed}
    if FAMILIES[model_type(kind)].field("head_size") is None:
        del fields["head_dim"]
    return config_class(**fields, attn_implementation="eager")


def tiny_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changed):
    """Return a tiny model of a kind, in evaluation mode, every parameter drawn from a normal of deviation 0.3."""
    model = getattr(transformers, FAMILIES[model_type(kind)].architecture)(tiny_config(kind, **changed))
    model = model.to(torch.float32 if kind in FLOAT32 else dtype).eval()
    if family(kind).experts:
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        stored = ("correction_bias", "layer_scalar")
        buffers = (buffer for name, buffer in model.named_buffers() if any(part in name for part in stored))
        for parameter in (*model.parameters(), *buffers):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def save_tiny(model, folder: Path) -> Path:
    """Save a model as a folder through safetensors, the tied output matrix left out as transformers does."""
    model.save_pretrained(folder)
    return folder


def anatomy_with(sizes: Sizes, kind: str = "llama", tied: bool = True) -> Anatomy:
    """Return the anatomy of a family's model of these sizes, with the weights of its table alone."""
    family = FAMILIES[kind]
    weights = frozenset(name for name in family.layer if name.endswith(".weight"))
    return Anatomy(family, sizes, weights, tied, ("full_attention",) * len(sizes.layers))


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Return the checkpoint tensors of a model: its state without the tied copy."""
    family = FAMILIES[model.config.model_type]
    state = {family.named(name): each for name, each in revert_weight_conversion(model, model.state_dict()).items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")}
    if model.config.tie_word_embeddings:
        state.pop(f"{FAMILIES[model.config.model_type].head}.weight")
    return state


def config_of(model) -> dict:
    return json.loads(json.dumps(model.config.to_dict()))


def tokens(batch: int = 2, length: int = 12, vocabulary: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
