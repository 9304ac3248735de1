"""The first two moments of what W_O and W_down read, in one forward-only calibration pass."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.prune.second_order.hessian import projections


@dataclass
class Moments:
    """Partial sums of one pass, float64, on the CPU: of x and of x² at each projection's input; they add over ranks."""

    inputs: dict[str, Tensor]  # by projection module name, [2, (n d)] or [2, f]
    tokens: Tensor  # [1]

    def tensors(self) -> list[Tensor]:
        """Return every sum, to be added over ranks in place."""
        return [*self.inputs.values(), self.tokens]

    def means(self) -> dict[str, Tensor]:
        """Return the mean input of each projection, by module name."""
        return {name: sums[0] / self.tokens for name, sums in self.inputs.items()}

    def variance(self, name: str) -> Tensor:
        """Return the variance of each input channel of a projection. Raise ValueError if no token was read."""
        if not int(self.tokens):
            raise ValueError("score.tokens: no calibration token was read; raise it")
        first, second = self.inputs[name] / self.tokens
        return (second - first.square()).clamp(min=0.0)


@torch.no_grad()
def moments(model: nn.Module, anatomy: Anatomy, batches: Iterable[Tensor]) -> Moments:
    """Return the sums over batches of ids [batch, sequence]; `model` maps ids to hidden states."""
    device = next(model.parameters()).device
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    sums = Moments({}, torch.zeros(1, dtype=torch.float64))
    with ExitStack() as hooks:
        for layer in range(len(anatomy.sizes.layers)):
            for axis, module in projections(anatomy).items():
                name = module.format(layer=layer)
                sums.inputs[name] = torch.zeros(2, anatomy.sizes.length(axis, layer), dtype=torch.float64)
                hooks.callback(modules[name].register_forward_pre_hook(partial(_add, sums.inputs[name])).remove)
        for ids in batches:
            sums.tokens += ids.numel()
            model(input_ids=ids.to(device), use_cache=False)
    return sums


def _add(total: Tensor, module: nn.Module, inputs: tuple) -> None:
    values = inputs[0].flatten(0, -2)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    total += torch.stack([wide.sum(0), wide.square().sum(0)]).to(total)
