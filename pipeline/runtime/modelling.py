"""Modelling code that travels inside an exported checkpoint: layers of unequal width and absorbed post-norms.

Needs torch and transformers only. The stock class builds the network; then the modules that `config.pruned` names
get their own widths, and post-norms that were absorbed become a multiplication by a static scale.
"""

import copy

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

HEADS = ("num_attention_heads", "num_key_value_heads")  # what a layer of attention may have of its own


class StaticScale(nn.Module):
    """y = x * weight: a post-norm frozen to a scale per channel (Pangu Light, post-RMSNorm absorption)."""

    def __init__(self, channels, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, dtype=dtype))

    def forward(self, x):
        return x * self.weight


class Removed(nn.Module):
    """An attention or FFN that was removed: it adds nothing to the residual stream and caches nothing."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, *rest, **named):
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.attention else nothing


def narrow(model, pruned):
    """Set the widths of the named modules of a stock model, in place."""
    for name, shape in pruned.get("shapes", {}).items():
        module_name, _, kind = name.rpartition(".")
        module = model.get_submodule(module_name)
        old = getattr(module, kind)
        setattr(module, kind, nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device)))
        if isinstance(module, nn.Linear) and kind == "weight":
            module.out_features, module.in_features = shape
        elif isinstance(module, Conv1D) and kind == "weight":
            module.nf = shape[1]
    for name, heads in pruned.get("attention", {}).items():
        module = model.get_submodule(name)
        module.config = copy.copy(module.config)
        for field in HEADS:
            value = heads[field]
            setattr(module.config, field, value)
            if hasattr(module, field):
                setattr(module, field, value)
        module.num_key_value_groups = heads["num_attention_heads"] // heads["num_key_value_heads"]
    for kind, names in pruned.get("removed", {}).items():
        for name in names:
            parent, _, leaf = name.rpartition(".")
            absent = nn.Identity() if kind == "norms" else Removed(kind == "attention")
            setattr(model.get_submodule(parent), leaf, absent)
    for name, place in pruned.get("cache", {}).items():
        module = model.get_submodule(name)
        for field in ("layer_idx", "layer_id"):  # of attentions, for their place in the cache
            if hasattr(module, field):
                setattr(module, field, place)
    for name in pruned.get("scales", ()):
        parent, _, leaf = name.rpartition(".")
        old = model.get_submodule(name).weight
        with old.device:
            setattr(model.get_submodule(parent), leaf, StaticScale(old.shape[0], old.dtype))


def pruned_class(base_name, config_class=None):
    """Return the class of a pruned model on top of the stock transformers class that a table of families names.

    `config_class` is one of `pruned_config`, where the folder's model_type is not the stock one.
    """
    base = getattr(transformers, base_name)

    class PrunedForCausalLM(base):
        def __init__(self, config):
            super().__init__(config)
            narrow(self, config.pruned)

        @classmethod
        def is_custom_code(cls):  # the stock class's own initialisation sets its buffers
            return False

    PrunedForCausalLM.config_class = config_class or base.config_class
    return PrunedForCausalLM


def pruned_config(base_name, name):
    """Return the stock class's config class under a model_type of its own, which the stock class does not accept."""

    class PrunedConfig(getattr(transformers, base_name).config_class):
        model_type = name

    return PrunedConfig
