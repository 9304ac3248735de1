"""A pass through a model layer by layer: the stream of every batch under way, and one layer at a time on the device."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.families import LAYER

from .measure import Batch


class Step:
    """One batch under way: its stream, and the other arguments that the model gives to each layer."""

    def __init__(self, mask: Tensor | None):
        self.mask = mask
        self.hidden: Tensor | None = None  # [batch, sequence, h], set by the first layer
        self.arguments: list[tuple[tuple, dict[str, Any]]] = []  # by layer

    def stand_in(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Take a layer's place: note its arguments and pass the stream on."""
        if self.hidden is None:
            self.hidden = hidden_states
        self.arguments.append((rest, named))
        return hidden_states

    def through(self, layer: nn.Module, index: int, place: torch.device) -> Tensor:
        """Give what a layer makes of the stream."""
        rest, named = _moved(self.arguments[index], place)
        output = layer(self.hidden.to(place), *rest, **named)
        return output[0] if isinstance(output, tuple) else output


def recorded(model: nn.Module, layers: Sequence[nn.Module], batches: Iterable[Batch]) -> list[Step]:
    """Run the model with stand-ins for its layers: embeddings, masks and rotations are its own, whatever the family."""
    home = next(model.parameters()).device
    steps = []
    for batch in batches:
        ids, mask = batch if isinstance(batch, tuple) else (batch, None)
        mask = None if mask is None else mask.to(home, torch.bool)
        step = Step(mask)
        with ExitStack() as undo:
            for layer in layers:
                layer.forward = step.stand_in
                undo.callback(delattr, layer, "forward")
            model(input_ids=ids.to(home), attention_mask=mask, use_cache=False)
        steps.append(step)
    return steps


def layers_of(modules: Mapping[str, nn.Module], anatomy: Anatomy) -> list[nn.Module]:
    """Give the layers among modules named as in the checkpoint."""
    return [modules[LAYER.format(layer=layer).rstrip(".")] for layer in range(len(anatomy.sizes.layers))]


def _moved(value: Any, place: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(place)
    if isinstance(value, Mapping):
        return {key: _moved(entry, place) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(entry, place) for entry in value)
    return value
