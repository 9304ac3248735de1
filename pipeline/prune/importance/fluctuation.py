"""Fluctuation (FLAP, 2312.11983): an input that varies little can be removed, as a bias can replace its mean.

The score of input channel j of W_O or W_down is Var(X_j) · ‖W_:j‖². FLAP's code squares the scores at W_O, which its
paper does not mention; so does `fluctuation`. To compare layers, FLAP standardises the scores of the channels of each
layer and kind, and then averages those of a head; `fluctuation_of_heads` is the other order, without the square.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.prune.importance.moments import Moments
from pipeline.prune.importance.score import Measured, Score, Units
from pipeline.prune.second_order.hessian import projections


def channel_scores(anatomy: Anatomy, source: Mapping[str, Tensor], moments: Moments) -> dict[str, list[Tensor]]:
    """Return Var(X_j) · ‖W_:j‖² per layer, float64, by the axis of the channels: `n d` of W_O, `f` of W_down."""
    layers = range(len(anatomy.sizes.layers))
    scores: dict[str, list[Tensor]] = {  # zeros on an axis that the family keeps whole
        axis: [torch.zeros(anatomy.sizes.length(axis, layer), dtype=torch.float64) for layer in layers]
        for axis in ("n d", "f")
    }
    for layer in layers:
        for axis, module in projections(anatomy).items():
            name = module.format(layer=layer)
            norms = source[f"{name}.weight"].to(torch.float64).square().sum(0)
            scores[axis][layer] = moments.variance(name) * norms.cpu()
    return scores


def head_means(anatomy: Anatomy, channels: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the mean over the channels of each head, per layer [n]."""
    return tuple(scores.unflatten(0, (-1, anatomy.sizes.head_size)).mean(1) for scores in channels)


def fluctuation(anatomy: Anatomy, source: Mapping[str, Tensor], measured: Measured) -> Units:
    """Return FLAP's scores; `deviations` are those of the channels, as the mean of a head's standardised channels is
    the head's mean, less the mean of the layer, over the deviation of the layer's channels."""
    channels = channel_scores(anatomy, source, measured.required("moments"))
    attention, neurons = [each.square() for each in channels["n d"]], channels["f"]
    deviations = torch.stack([torch.stack([each.std() for each in kind]) for kind in (attention, neurons)])
    return Units(head_means(anatomy, attention), tuple(neurons), deviations)


SCORE = Score(fluctuation, needs=frozenset({"moments"}))
