"""Scores of the experts of a mixture, and of the neurons of each, from sums over the tokens that are routed to them.

For token t and expert j: g_j(t) is the router's weight after normalisation, f_j(t) the expert's output, T_j the tokens
that the router sends to j.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.forwards import replaced_forward
from pipeline.model.scores import NORMS, PRODUCTS, TOKENS


@dataclass
class ExpertSums:
    """Partial sums of one pass over the experts, float64; they add over batches and ranks.

    Layers without experts have sums of no expert.
    """

    routing: list[Tensor]  # per layer [4, e], the rows as `Scores` has them
    neurons: list[Tensor]  # per layer [e, x], |(act(X W_gate) * X W_up)_m| summed over T_j (Pangu Light eq. 3)

    def tensors(self) -> list[Tensor]:
        """Return every sum, to be added over ranks in place."""
        return [*self.routing, *self.neurons]


def empty_sums(anatomy: Anatomy, zeros: Callable[..., Tensor]) -> ExpertSums:
    """Return sums of zero; `zeros` makes a tensor of given lengths."""
    lengths = [
        (anatomy.sizes.carried["e"], anatomy.sizes.carried["x"]) if anatomy.sparse(layer) else (0, 0)
        for layer in range(len(anatomy.sizes.layers))
    ]
    return ExpertSums([zeros(4, experts) for experts, _ in lengths], [zeros(*each) for each in lengths])


def watch_experts(model: nn.Module, anatomy: Anatomy, sums: ExpertSums, undo: ExitStack) -> None:
    """Add to the sums what the experts of a model compute, until `undo`.

    The fused modules of experts run one expert after another on the tokens that are routed to it: the sums need the
    output of each, and float64 has no other implementation. No weights are copied.
    """
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    forwards = {
        modules[anatomy.expert_module(layer)]: partial(
            _forward, modules[anatomy.expert_module(layer)], sums.routing[layer], sums.neurons[layer]
        )
        for layer in range(len(anatomy.sizes.layers))
        if anatomy.sparse(layer)
    }
    undo.enter_context(replaced_forward(forwards))


def expert_output(module: Any, expert: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the neurons [t, x] and the output [t, h] of one expert of a fused module for states [t, h]."""
    neurons = module._apply_gate(_product(module, "gate_up_proj", expert, states))
    return neurons, _product(module, "down_proj", expert, neurons)


def _product(module: Any, name: str, expert: int, values: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    result = values @ (weight if module.is_transposed else weight.T)
    return result + getattr(module, f"{name}_bias")[expert] if module.has_bias else result


def _forward(
    module: nn.Module, routing: Tensor, neurons: Tensor, states: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Return what a module of experts returns for states [t, h], the chosen experts [t, k] and their weights [t, k]."""
    output = torch.zeros_like(states)
    for expert in range(len(neurons)):
        token, place = torch.where(chosen == expert)
        if not len(token):
            continue
        inner, values = expert_output(module, expert, states[token])
        weight = weights[token, place]
        output.index_add_(0, token, (values * weight[:, None]).to(output.dtype))
        wide = torch.promote_types(values.dtype, torch.float32)
        norms, gains = torch.linalg.vector_norm(values, dim=-1, dtype=wide), weight.to(wide)
        added = torch.stack([torch.ones_like(norms), gains, norms, gains * norms]).sum(1)
        routing[:, expert] += added.to(routing)
        neurons[expert] += inner.abs().sum(0, dtype=wide).to(neurons)
    return output


ExpertScore = Callable[[Tensor], Tensor]  # the sums of a layer [4, e] -> a score of each expert [e]


def reap(sums: Tensor) -> Tensor:
    """Return the mean of g_j |f_j| over T_j (REAP, 2510.13999); zero where no token was routed to an expert."""
    return sums[PRODUCTS] / sums[TOKENS].clamp(min=1.0)


def frequency(sums: Tensor) -> Tensor:
    """Return |T_j|, the number of tokens that are routed to an expert."""
    return sums[TOKENS].clone()


def man(sums: Tensor) -> Tensor:
    """Return the mean of |f_j| over T_j (mean activation norm); zero where no token was routed to an expert."""
    return sums[NORMS] / sums[TOKENS].clamp(min=1.0)


EXPERT_SCORES: dict[str, ExpertScore] = {"reap": reap, "frequency": frequency, "man": man}
