"""The contract of an importance score: what it needs from the calibration text, and how it follows from that."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.scores import Scores
from pipeline.prune.importance.moments import Moments

PASSES = ("moments", "gradients")  # over the calibration text, beside the forward pass of `measure`


class Units(NamedTuple):
    """Scores of heads and neurons, float64; the higher is kept."""

    heads: tuple[Tensor, ...]  # per layer [n]
    neurons: tuple[Tensor, ...]  # per layer [f]
    deviations: Tensor | None = None  # [2, layer], see `Scores`


@dataclass(frozen=True)
class Measured:
    """What passes over the calibration text measured, added over ranks; None where no score needs it."""

    scores: Scores  # eq. 1-4 of Pangu Light, always measured
    moments: Moments | None = None  # of what W_O and W_down read
    gradients: Mapping[str, Tensor] | None = None  # of the summed next-token loss, by tensor name

    def required(self, name: str) -> Any:
        """Return what a pass of PASSES measured. Raise ValueError where the score did not name it among its needs."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the score reads {name}, which its needs do not name; add it")
        return value


@dataclass(frozen=True)
class Score:
    """One way to score heads and neurons.

    `compute` maps the anatomy, the checkpoint's tensors by name and what was measured to the scores. `needs` names the
    passes of PASSES that it reads beside the forward pass; a score that reads the weights alone names none.
    """

    compute: Callable[[Anatomy, Mapping[str, Tensor], Measured], Units]
    needs: frozenset[str] = frozenset()

    def __post_init__(self):
        unknown = self.needs - set(PASSES)
        if unknown:
            raise ValueError(f"needs: unknown passes {sorted(unknown)}; choose from {PASSES}")


def standardised(scores: Scores, layers: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the scores of heads and of neurons in some layers in a form that compares across layers and kinds.

    Each layer's mean is subtracted and the rest divided by `scores.deviations`, or else by the layer's own standard
    deviation; scores that do not differ within a layer are zero.
    """
    given = [None, None] if scores.deviations is None else scores.deviations[:, list(layers)]
    heads, neurons = ([kind[layer] for layer in layers] for kind in (scores.heads, scores.neurons))
    return _standardised(heads, given[0]), _standardised(neurons, given[1])


def _standardised(layers: Iterable[Tensor], given: Tensor | None) -> tuple[Tensor, ...]:
    centred = [scores - scores.mean() for scores in layers]
    deviations = [each.std(correction=0) for each in centred] if given is None else given
    return tuple(
        each / deviation.clamp(min=torch.finfo(each.dtype).tiny) for each, deviation in zip(centred, deviations)
    )
