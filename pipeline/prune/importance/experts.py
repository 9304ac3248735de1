"""Scores of the experts of a mixture, and of the neurons of each, from sums over the tokens that are routed to them.

For token t and expert j: g_j(t) is the router's weight after normalisation, f_j(t) the expert's output, T_j the tokens
that the router sends to j. Where the class multiplies the expert's input by the weight, as Llama 4's does, f_j(t) is
the output for that input, and g_j(t) is 1.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.scores import NORMS, PRODUCTS, TOKENS
from pipeline.prune.passes.experts import watch_experts


@dataclass
class ExpertSums:
    """Partial sums of one pass over the experts, float64; they add over batches and ranks.

    Layers without experts have sums of no expert.
    """

    routing: list[Tensor]  # per layer [4, e], the rows as `Scores` has them
    neurons: list[Tensor]  # per layer [e, x], |(act(X W_gate) * X W_up)_m| summed over T_j (Pangu Light eq. 3)
    shared: list[Tensor]  # per layer [y], the same of the neurons of shared experts, over all tokens

    def tensors(self) -> list[Tensor]:
        """Return every sum, to be added over ranks in place."""
        return [*self.routing, *self.neurons, *self.shared]


def empty_sums(anatomy: Anatomy, zeros: Callable[..., Tensor]) -> ExpertSums:
    """Return sums of zero; `zeros` makes a tensor of given lengths."""
    carried, layers = anatomy.sizes.carried, range(len(anatomy.sizes.layers))
    sparse = [anatomy.sparse(layer) for layer in layers]
    return ExpertSums(
        [zeros(4, carried["e"] if has else 0) for has in sparse],
        [zeros(*((carried["e"], carried["x"]) if has else (0, 0))) for has in sparse],
        [zeros(carried["y"] if has and anatomy.shared_writer else 0) for has in sparse],
    )


def measure_experts(model: nn.Module, anatomy: Anatomy, sums: ExpertSums, undo: ExitStack) -> None:
    """Add to the sums what the experts of a model compute, routed and shared, until `undo`."""
    sparse = [layer for layer in range(len(anatomy.sizes.layers)) if anatomy.sparse(layer)]
    watch_experts(
        model, anatomy, {layer: partial(_add, sums.routing[layer], sums.neurons[layer]) for layer in sparse}, undo
    )
    if anatomy.shared_module is None:
        return
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    for layer in sparse:
        writer = modules[anatomy.shared_module.format(layer=layer)]
        undo.callback(writer.register_forward_pre_hook(partial(_shared, sums.shared[layer])).remove)


def _add(routing: Tensor, neurons: Tensor, expert: int, inner: Tensor, values: Tensor, weight: Tensor) -> None:
    wide = torch.promote_types(values.dtype, torch.float32)
    norms, gains = torch.linalg.vector_norm(values, dim=-1, dtype=wide), weight.to(wide)
    added = torch.stack([torch.ones_like(norms), gains, norms, gains * norms]).sum(1)
    routing[:, expert] += added.to(routing)
    neurons[expert] += inner.abs().sum(0, dtype=wide).to(neurons)


def _shared(total: Tensor, module: nn.Module, inputs: tuple) -> None:
    rows = inputs[0].abs().flatten(0, -2)
    total += rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(total)


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
