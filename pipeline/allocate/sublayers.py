"""Which attentions and FFNs leave a model: one after another, each time by the divergence of the model without it."""

import math
from collections.abc import Callable, Sequence

from pipeline.model.shape import Removal

Part = tuple[int, str]  # a layer, and what it loses, of SUBLAYERS
Removed = tuple[Part, ...]
Divergence = Callable[[Removed, Part | None], float]  # of the model without parts, and without one more


def greedy_sublayers(
    parts: Sequence[Part],
    divergence: Divergence,
    *,
    allowed: Callable[[Removed, Part], bool],
    enough: Callable[[Removed], bool],
    size: Callable[[Removed], float] | None,
    candidates: int | None,
) -> list[Removal]:
    """Remove sub-layers one at a time, each time the one of least score, measured without those that are removed.

    The score is the divergence of the model without it; with `size`, the rise of the divergence over what leaves the
    size of the model. Each removal is chosen among the `candidates` of least score when last measured; None: all.
    Raise ValueError where nothing more may be removed and it is not `enough`.
    """
    removed: Removed = ()
    now, found = divergence(removed, None), []
    last: dict[Part, float] = {}
    while not enough(removed):
        left = [part for part in parts if part not in removed and allowed(removed, part)]
        if not left:
            raise ValueError(f"no attention or FFN may be removed after {len(removed)} of them; request fewer")
        near = left if candidates is None else sorted(left, key=lambda part: last.get(part, -math.inf))[:candidates]
        measure = [part for part in left if part in near or part not in last]
        divergences = {}
        for part in measure:  # upwards, so that passes share the layers below
            value = divergence(removed, part)
            divergences[part] = value if math.isfinite(value) else math.inf
            freed = 1.0 if size is None else size(removed) - size((*removed, part))
            last[part] = divergences[part] if size is None else (divergences[part] - now) / freed
        best = min(measure, key=lambda part: last[part])
        removed, now = (*removed, best), divergences[best]
        found.append(Removal(*best, now))
    return found
