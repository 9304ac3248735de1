"""Activation scores of heads and neurons (Pangu Light 2505.20155, eq. 2 and 3), as the forward pass measured them."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.prune.importance.score import Measured, Score, Units


def activation(anatomy: Anatomy, source: Mapping[str, Tensor], measured: Measured) -> Units:
    """Return the sums over tokens of ‖head(X)‖₂ and |(act(X W_gate) ⊙ X W_up)_m|, as `measure` aggregates them."""
    return Units(measured.scores.heads, measured.scores.neurons)


SCORE = Score(activation)
