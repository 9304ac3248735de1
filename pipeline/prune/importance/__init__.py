"""Importance scores of heads and neurons, by the name that `score.kind` selects. A new score is a file and an entry."""

from pipeline.prune.importance import activation, fluctuation, fluctuation_of_heads, magnitude, taylor
from pipeline.prune.importance.score import Score

SCORES: dict[str, Score] = {
    "activation": activation.SCORE,
    "taylor": taylor.SCORE,
    "fluctuation": fluctuation.SCORE,
    "fluctuation_of_heads": fluctuation_of_heads.SCORE,
    "magnitude": magnitude.SCORE,
}


def score_named(name: str) -> Score:
    """Return a registered score. Raise ValueError, with the choices, for a name that is not registered."""
    if name not in SCORES:
        raise ValueError(f"score.kind: unknown score {name!r}; choose from {', '.join(SCORES)}")
    return SCORES[name]
