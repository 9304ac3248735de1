"""A Hugging Face causal language model: its type in signatures, and its decoder."""

from typing import Any, TypeAlias

from torch import nn

from pipeline.model.families import family_of

CausalModel: TypeAlias = Any  # an nn.Module; its config, decoder and head are attributes that no type checker knows


def decoder_of(model: CausalModel) -> nn.Module:
    """Return the module that holds the layers and maps ids [batch, sequence] to hidden states [batch, sequence, h].

    `get_decoder` of some classes, such as Llama 4's, returns the model itself. ValueError for a type without a table.
    """
    return model.get_submodule(family_of(model.config.model_type).decoder)
