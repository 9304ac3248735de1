"""hessian: H = XᵀX of what W_O and W_down read, which the removal order and the restoration need, and of
what W_down of narrowed experts reads.

H is the Hessian of the squared output error of a linear layer, up to a factor.
"""

import shutil
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

from torch import Tensor

from pipeline.config import Config
from pipeline.model.anatomy import Anatomy
from pipeline.model.causal import decoder_of
from pipeline.prune.second_order.experts import Watched, expert_grams, narrowed_parts
from pipeline.prune.second_order.hessian import gram, projections
from pipeline.runtime.checkpoint_writer import write_tensors
from pipeline.runtime.disk import need_space
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage

BYTES = 8  # of an entry, in memory and on disk


def enabled(config: Config) -> bool:
    """Return whether units are ranked by optimal brain surgeon or outputs are restored."""
    return config.restore.outputs or config.restore.order == "obs"


def settings(config: Config) -> dict:
    """Return the number of calibration tokens, the seed that orders the text, and which experts are narrowed."""
    return {"tokens": config.restore.tokens, "seed": config.seed} | _narrowed(config)


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write H [in, in] in float64 by projection name, over `restore.tokens`, summed over ranks.

    layer-NNNNN.safetensors hold those of W_O and W_down; layer-NNNNN-experts-NNNNN.safetensors, where narrowed experts
    are restored, those of W_down of consecutive experts from one on.
    """
    ranks = machine.ranks
    anatomy = checkpoint(config, inputs["subject"]).anatomy
    bytes_of = [_bytes(anatomy, layer) for layer in range(len(anatomy.sizes.layers))]
    parts = narrowed_parts(anatomy, **_narrowed(config)) if _narrowed(config) else []
    if not any(bytes_of) and not parts:
        raise ValueError(
            f"restore.outputs: model_type {anatomy.family.model_type!r} keeps its heads and neurons, and no experts "
            "are narrowed, so nothing is restored; set restore.outputs=false"
        )
    need_space(out, sum(bytes_of) + sum(map(_part_bytes, parts)))
    model = load(inputs["subject"], machine)
    batches = calibration(config, inputs, config.restore.tokens, ranks)
    if ranks.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    with placed(decoder_of(model), machine.device, config.device.layer_streaming) as decoder:
        for layers in _passes(bytes_of, config.restore.memory) if any(bytes_of) else ():
            label = f"hessian, layers {layers[0]} to {layers[-1]}"
            sums = gram(decoder, anatomy, machine.progress(batches, len(batches), label), layers, stream=False)
            ranks.sum_(sums.tensors())
            if ranks.rank == 0:
                for layer in layers:
                    names = [module.format(layer=layer) for module in projections(anatomy).values()]
                    write_tensors(out / f"layer-{layer:05d}.safetensors", {name: sums.inputs[name] for name in names})
        for places in _passes(list(map(_part_bytes, parts)), config.restore.memory) if parts else ():
            some = [parts[place] for place in places]
            label = f"hessian, experts of layers {some[0].layer} to {some[-1].layer}"
            found = expert_grams(decoder, anatomy, machine.progress(batches, len(batches), label), some)
            ranks.sum_(list(found.values()))
            if ranks.rank == 0:
                _write(out, some, found)


def _narrowed(config: Config) -> dict[str, bool]:
    """Return whether the Gram matrices of routed and of shared experts are needed; empty where neither is."""
    shape = config.shape
    chosen = {"inner": shape.expert_neurons is not None, "shared": shape.shared_neurons is not None}
    return chosen if config.restore.outputs and any(chosen.values()) else {}


def _write(out: Path, parts: list[Watched], grams: Mapping[str, Tensor]) -> None:
    for layer, own in groupby(parts, key=lambda part: part.layer):
        members = list(own)
        first = members[0].expert
        name = "shared" if first is None else f"experts-{first:05d}"
        write_tensors(out / f"layer-{layer:05d}-{name}.safetensors", {part.name: grams[part.name] for part in members})


def _bytes(anatomy: Anatomy, layer: int) -> int:
    return BYTES * sum(anatomy.sizes.length(axis, layer) ** 2 for axis in projections(anatomy))


def _part_bytes(part: Watched) -> int:
    return BYTES * part.width**2


def _passes(bytes_of: list[int], limit: float) -> Iterator[list[int]]:
    """Yield consecutive places, at least one at a time, whose matrices fit in `limit` bytes."""
    places: list[int] = []
    size = 0
    for place, needed in enumerate(bytes_of):
        if places and size + needed > limit:
            yield places
            places, size = [], 0
        places.append(place)
        size += needed
    yield places


STAGE = Stage(
    name="hessian",
    makes="hessians",
    run=run,
    settings=settings,
    needs=("subject", "tokens"),
    enabled=enabled,
)
