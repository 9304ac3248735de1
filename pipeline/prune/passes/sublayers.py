"""A model without some of its attentions and FFNs, whose weights stay as they are."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.causal import CausalModel
from pipeline.model.forwards import replaced_forward


def without_sublayers(
    model: CausalModel, anatomy: Anatomy, removed: Iterable[tuple[int, str]]
) -> AbstractContextManager[None]:
    """Within the block, the attention or FFN of some layers adds nothing to the residual stream.

    Norms of its output are silent too. It is the model that `cut` makes where these sub-layers are removed.
    """
    forwards = {}
    for layer, axis in removed:
        sublayer = anatomy.family.sublayers[axis]
        prefix = anatomy.family.prefix.format(layer=layer)
        writes = _no_attention if axis == "attention_layers" else _nothing
        forwards[model.get_submodule(prefix + sublayer.module)] = writes
        after = (norm for norm in sublayer.norms if norm in anatomy.family.post_norms)
        forwards |= {model.get_submodule(prefix + norm): _nothing for norm in after}
    return replaced_forward(forwards)


def _nothing(hidden_states: Tensor, *rest: object, **named: object) -> Tensor:
    return torch.zeros_like(hidden_states)


def _no_attention(hidden_states: Tensor, *rest: object, **named: object) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None
