"""The class of transformers that a config.json describes, and the shapes of its weights."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.model.families import family_of
from pipeline.runtime.modelling import pruned_class

POSITIONS = "max_position_embeddings"


@cache
def config_fields(kind: str) -> dict[str, str]:
    """Return the fields that the config class of a model type has, by each of their names in a config.json."""
    chosen = CONFIG_MAPPING[kind]
    return {field.name: field.name for field in fields(chosen)} | chosen.attribute_map


@cache
def reserved_names(kind: str | None = None) -> frozenset[str]:
    """Return the names of the methods and class attributes of a config class, which an entry of a file would hide."""
    chosen = PreTrainedConfig if kind is None else CONFIG_MAPPING[kind]
    own = {name for name in dir(chosen) if not isinstance(getattr(chosen, name), property)}
    return frozenset(own - {field.name for field in fields(chosen)} - {"model_type"})


def stock_config(config: Mapping[str, Any], folder: Path) -> PreTrainedConfig:
    """Return the config object of the stock class; ValueError, naming config.json, where transformers refuses it."""
    try:
        return AutoConfig.for_model(**config)
    except Exception as fault:  # transformers' validation raises whatever a field's value leads to
        raise _refusal(folder, fault) from fault


def stated_fields(whole: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """Return the fields of a config object as a file of it has them; ValueError as `stock_config`."""
    try:
        return whole.to_dict()
    except Exception as fault:  # as whatever a value leads to
        raise _refusal(folder, fault) from fault


def _refusal(folder: Path, fault: Exception) -> ValueError:
    path = folder / "config.json"
    return ValueError(f"{path} is refused by transformers ({reason(fault)}); correct that field, or fetch it again")


def most_positions(config: Mapping[str, Any], folder: Path) -> int | None:
    """Return the most tokens of a sequence, by whichever name the class of a model has for it; None without a limit."""
    known = config.get("model_type") in CONFIG_MAPPING
    return getattr(stock_config(config, folder), POSITIONS, None) if known else config.get(POSITIONS)


def class_shapes(config: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the class that a config describes; a tied output matrix is left out.

    Raise ValueError as `class_of`.
    """
    model = class_of(config, folder)
    tensors: dict[str, Tensor] = dict(model.named_parameters())  # a tied one comes once
    doubled = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {name: buffer for name, buffer in model.state_dict().items() if name not in doubled}
    family = family_of(config["model_type"])
    return {family.named(n): tuple(tensor.shape) for n, tensor in revert_weight_conversion(model, tensors).items()}


def class_of(config: Mapping[str, Any], folder: Path) -> PreTrainedModel:
    """Return the class that a config describes, built on the meta device.

    Raise ValueError, naming config.json, where it cannot be built.
    """
    whole = stock_config(config, folder)
    try:
        with torch.device("meta"):
            if "pruned" in config:
                return pruned_class(family_of(config["model_type"]).architecture)(whole)
            return AutoModelForCausalLM.from_config(whole)
    except Exception as fault:  # a class raises whatever a field's value leads to
        raise ValueError(
            f"{folder / 'config.json'} is refused by {config['architectures'][0]} ({reason(fault)}); correct that "
            "field, or fetch it again"
        ) from fault


def reason(fault: Exception) -> str:
    """Return the type of an error and the beginning of its message, on one line."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split()):.160}"
