"""Learning rates as functions of the step, counted from 0."""

import math

DECAYED = 0.1  # constant_decay: the share of the steps at the end over which the rate falls (Adapt-Pruner)


def learning_rate(kind: str, step: int, steps: int, peak: float, warmup: float, floor: float) -> float:
    """Give the learning rate of step 0 .. steps - 1; ValueError for an unknown kind.

    Rises linearly over the first `warmup` share of the steps, reaching `peak` on the last of them; then falls to
    `floor` times `peak`, reached on the last step: along a cosine, or (constant_decay) linearly over the last tenth.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    top = max(0, rising - 1)
    if kind == "cosine":
        progress = _progress(step, top, steps)
        return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    if kind == "constant_decay":
        begin = max(top, steps - math.ceil(DECAYED * steps) - 1)
        return peak * (1.0 - (1.0 - floor) * max(0.0, _progress(step, begin, steps)))
    raise ValueError(f"distill.lr_scheduler is {kind!r}; choose cosine or constant_decay")


def _progress(step: int, begin: int, steps: int) -> float:
    """How far between the steps `begin` (0) and the last (1)."""
    return (step - begin) / max(1, steps - 1 - begin)
