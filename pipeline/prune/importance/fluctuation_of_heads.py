"""FLAP's fluctuation in another order: averaged over the channels of a head first, then standardised over heads."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.prune.importance.fluctuation import channel_scores, head_means
from pipeline.prune.importance.score import Measured, Score, Units


def fluctuation_of_heads(anatomy: Anatomy, source: Mapping[str, Tensor], measured: Measured) -> Units:
    """Return the mean Var(X_j) · ‖W_:j‖² of each head, and that of each neuron."""
    channels = channel_scores(anatomy, source, measured.required("moments"))
    return Units(head_means(anatomy, channels["n d"]), tuple(channels["f"]))


SCORE = Score(fluctuation_of_heads, needs=frozenset({"moments"}))
