"""First-order saliency of coupled structures, Σ |w · ∂L/∂w| (LLM-Pruner 2305.11627, Adapt-Pruner 2502.03460)."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.causal import CausalModel
from pipeline.prune.importance.coupled import coupled, is_coupled
from pipeline.prune.importance.score import Measured, Score, Units

Head = Callable[[Tensor, Tensor], Tensor]  # final hidden states [b, s, h], labels [b, s] -> mean loss of labels, nats


def gradients(model: CausalModel, anatomy: Anatomy, batches: Iterable[Tensor], head: Head) -> dict[str, Tensor]:
    """Return ∂L/∂w, L the next-token loss summed over all tokens, of every layer tensor with heads or neurons, by name.

    `model` is a causal language model and `head` its next-token loss; batches are ids [batch, sequence]. Sums are
    float32 on the model's device and add over batches and ranks. Memory: one float32 copy of the layers, one gradient
    in the model's own dtype at a time, and what the head takes.
    """
    scored = {
        pattern.format(layer=layer)
        for layer in range(len(anatomy.sizes.layers))
        for pattern, segments in anatomy.layer_tensors.items()
        if is_coupled(segments)
    }
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    with ExitStack() as undo:
        for name, parameter in model.named_parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(name in scored)
            if name in scored:
                sums[name] = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
                undo.callback(parameter.register_post_accumulate_grad_hook(partial(_collect, sums[name])).remove)
        for ids in batches:
            with torch.enable_grad():
                _loss(model, head, ids.to(device)).backward()
    return sums


def saliency(anatomy: Anatomy, source: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> Units:
    """Return Σ |w · ∂L/∂w| over each structure of `coupled`.

    `sums` are gradients that were added over ranks: the absolute value is taken of the whole sum.
    """

    def terms(name: str) -> Tensor:
        return (source[name].to(torch.float64).cpu() * sums[name].to(torch.float64).cpu()).abs()

    return coupled(anatomy, terms)


def _compute(anatomy: Anatomy, source: Mapping[str, Tensor], measured: Measured) -> Units:
    return saliency(anatomy, source, measured.required("gradients"))


def _collect(total: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not None:
        total += parameter.grad
    parameter.grad = None


def _loss(model: CausalModel, head: Head, ids: Tensor) -> Tensor:
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    labels = ids[:, 1:]
    return head(states, labels) * labels.numel()


SCORE = Score(_compute, needs=frozenset({"gradients"}))
