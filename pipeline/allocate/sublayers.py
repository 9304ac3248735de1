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

    The score is the rise of the divergence; with `size`, over what leaves the size of the model. Before each removal
    the `candidates` of least score when last measured are measured again, and any other whose last score is below the
    least of these; None: all. The choice is then that of measuring all as long as scores only rise. What a
    later removal, which frees more, makes unnecessary stays, the latest first. Raise ValueError where nothing more may
    be removed and it is not `enough`.
    """
    removed: Removed = ()
    now, found = divergence(removed, None), []
    last: dict[Part, float] = {}
    while not enough(removed):
        left = [part for part in parts if part not in removed and allowed(removed, part)]
        if not left:
            raise ValueError(f"no attention or FFN may be removed after {len(removed)} of them; request fewer")
        fresh: dict[Part, float] = {}
        near = sorted(left, key=lambda part: last.get(part, -math.inf))[:candidates]
        near += [part for part in left if part not in last and part not in near]
        while near:
            for part in sorted(near, key=parts.index):  # upwards, so that passes share the layers below
                value = divergence(removed, part)
                fresh[part] = value if math.isfinite(value) else math.inf
                freed = 1.0 if size is None else size(removed) - size((*removed, part))
                last[part] = (fresh[part] - now) / freed
            best = min(fresh, key=lambda part: last[part])
            near = [part for part in left if part not in fresh and last[part] < last[best]]
        removed, now = (*removed, best), fresh[best]
        found.append(Removal(*best, now))
    needed = removed
    for part in reversed(removed):
        fewer = tuple(each for each in needed if each != part)
        needed = fewer if enough(fewer) else needed
    if needed == removed:
        return found
    return [Removal(*part, divergence(needed[:count], part)) for count, part in enumerate(needed)]
