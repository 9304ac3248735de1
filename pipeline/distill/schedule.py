"""Learning rates, and lengths of answers, as functions of the step, counted from 0."""

import math

DECAYED = 0.1  # wsd: the fraction of the steps at the end over which the rate falls (Adapt-Pruner)


def learning_rate(kind: str, step: int, steps: int, peak: float, warmup: float, floor: float) -> float:
    """Return the learning rate of step 0 .. steps - 1; ValueError for an unknown kind.

    It rises linearly over the first `warmup` fraction of the steps and reaches `peak` on the last of them; then it
    falls to `floor` times `peak` on the last step: along a cosine, or linearly over the last tenth (wsd: warm-up,
    stable, decay).
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    top = max(0, rising - 1)
    if kind == "cosine":
        progress = _progress(step, top, steps)
        return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    if kind == "wsd":
        begin = max(top, steps - math.ceil(DECAYED * steps) - 1)
        return peak * (1.0 - (1.0 - floor) * max(0.0, _progress(step, begin, steps)))
    raise ValueError(f"distill.lr_scheduler: {kind!r} is no schedule; choose cosine or wsd")


def answer_length(step: int, steps: int, shortest: int, longest: int) -> int:
    """Return the tokens of an answer at a step: from `shortest` at the first to `longest` at the last, linearly."""
    return shortest + (longest - shortest) * step // max(1, steps - 1)


def _progress(step: int, begin: int, steps: int) -> float:
    """Return how far a step is from `begin` (0) to the last step (1)."""
    return (step - begin) / max(1, steps - 1 - begin)
