"""First-order saliency of coupled structures, Σ |w · ∂L/∂w| (LLM-Pruner 2305.11627, Adapt-Pruner 2502.03460).

A KV group is coupled with its own queries, head h with group h // q; a neuron is its gate and up rows and down column.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.prune.importance.magnitude import AXES, coupled
from pipeline.prune.importance.measure import Batch

IGNORED = -100
Head = Callable[[Tensor, Tensor], Tensor]  # final hidden states [b, s, h], labels [b, s] -> mean loss of labels, nats


def gradients(model: nn.Module, anatomy: Anatomy, batches: Iterable[Batch], head: Head) -> dict[str, Tensor]:
    """Give ∂L/∂w, L the next-token loss summed over all tokens, of every layer tensor with heads or neurons, by name.

    `model` is a causal language model and `head` its next-token loss. Sums are float32 on the model's device and add
    over batches and ranks; memory: one float32 copy of the layers, one gradient in the model's own dtype at a time, and
    what the head takes.
    """
    wanted = {
        pattern.format(layer=layer)
        for layer in range(len(anatomy.sizes.layers))
        for pattern, segments in anatomy.layer_tensors.items()
        if set(segments[0]) & set(AXES)
    }
    place = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    with ExitStack() as undo:
        for name, parameter in model.named_parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(name in wanted)
            if name in wanted:
                sums[name] = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
                undo.callback(parameter.register_post_accumulate_grad_hook(partial(_collect, sums[name])).remove)
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple) else (batch, None)
            mask = None if mask is None else mask.to(place, torch.bool)
            with torch.enable_grad():
                _loss(model, head, ids.to(place), mask).backward()
    return sums


def saliency(
    anatomy: Anatomy, source: Mapping[str, Tensor], sums: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Give Σ |w · ∂L/∂w| per layer, of heads [n] and of neurons [f], float64, as `Scores` hold them.

    Structures are those of `coupled`. `sums` are gradients, added over ranks before, not after.
    """

    def terms(name: str) -> Tensor:
        return (source[name].to(torch.float64).cpu() * sums[name].to(torch.float64).cpu()).abs()

    return coupled(anatomy, terms)


def _collect(total: Tensor, parameter: Tensor) -> None:
    total += parameter.grad
    parameter.grad = None


def _loss(model: nn.Module, head: Head, ids: Tensor, mask: Tensor | None) -> Tensor:
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    labels = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~mask[:, 1:], IGNORED)
    return head(states, labels) * (labels != IGNORED).sum()
