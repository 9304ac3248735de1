"""Magnitude of coupled structures: the simplest score, which reads no text."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.prune.importance.coupled import coupled
from pipeline.prune.importance.score import Measured, Score, Units


def magnitude(anatomy: Anatomy, source: Mapping[str, Tensor]) -> Units:
    """Return Σ |w| over each coupled structure."""
    return coupled(anatomy, lambda name: source[name].abs())


def _compute(anatomy: Anatomy, source: Mapping[str, Tensor], measured: Measured) -> Units:
    return magnitude(anatomy, source)


SCORE = Score(_compute)
