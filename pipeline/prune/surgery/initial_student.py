"""The student before recovery: what `cut` makes of a model, re-initialised as a configuration asks."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.prune.second_order.experts import restore_experts
from pipeline.prune.second_order.restore import DAMPING, restore_outputs
from pipeline.prune.surgery.cut import as_it_is, cut
from pipeline.prune.surgery.reinit import compensate_gain, stabilise_gains


def begun(
    anatomy: Anatomy,
    blueprint: Blueprint,
    source: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    slnp: bool,
    gain_compensation: bool,
    grams: Mapping[str, Tensor] | None = None,
    damping: float = DAMPING,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the student's tensors by name: cut, donated rows compensated, outputs restored, gains stabilised.

    `config` is the source's config.json, whose static scales are no gains. Outputs are restored where Gram matrices are
    given, by source module name. ValueError as from each of these steps.
    """
    stream = cut(anatomy, blueprint, source, compensate_gain(anatomy, source) if gain_compensation else as_it_is)
    if grams is not None:
        stream = restore_outputs(anatomy, blueprint, source, grams, stream, damping)
        stream = restore_experts(anatomy, blueprint, source, grams, stream, damping)
    if slnp:
        stream = stabilise_gains(anatomy, blueprint, source, stream, config.get("pruned", {}).get("scales", ()))
    return stream
