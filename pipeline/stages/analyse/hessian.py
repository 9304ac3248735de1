"""hessian: H = XᵀX of what W_O and W_down read, which the removal order and the restoration need.

H is the Hessian of the squared output error of a linear layer, up to a factor.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config
from pipeline.model.anatomy import Anatomy
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
    """Return the number of calibration tokens and the seed that orders the text."""
    return {"tokens": config.restore.tokens, "seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write layer-NNNNN.safetensors: H [in, in] in float64 by projection name, over `restore.tokens`, summed over
    ranks."""
    ranks = machine.ranks
    anatomy = checkpoint(config, inputs["subject"]).anatomy
    bytes_of = [_bytes(anatomy, layer) for layer in range(len(anatomy.sizes.layers))]
    need_space(out, sum(bytes_of))
    model = load(inputs["subject"], machine)
    batches = calibration(config, inputs, config.restore.tokens, ranks)
    if ranks.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    with placed(model.get_decoder(), machine.device, config.device.layer_streaming) as decoder:
        for layers in _passes(bytes_of, config.restore.memory):
            label = f"hessian, layers {layers[0]} to {layers[-1]}"
            sums = gram(decoder, anatomy, machine.progress(batches, len(batches), label), layers, stream=False)
            ranks.sum_(sums.tensors())
            if ranks.rank == 0:
                for layer in layers:
                    names = [module.format(layer=layer) for module in projections(anatomy).values()]
                    write_tensors(out / f"layer-{layer:05d}.safetensors", {name: sums.inputs[name] for name in names})


def _bytes(anatomy: Anatomy, layer: int) -> int:
    return BYTES * sum(anatomy.sizes.length(axis, layer) ** 2 for axis in projections(anatomy))


def _passes(bytes_of: list[int], limit: float) -> Iterator[list[int]]:
    """Yield consecutive layers, at least one at a time, whose matrices fit in `limit` bytes."""
    layers: list[int] = []
    size = 0
    for layer, needed in enumerate(bytes_of):
        if layers and size + needed > limit:
            yield layers
            layers, size = [], 0
        layers.append(layer)
        size += needed
    yield layers


STAGE = Stage(
    name="hessian",
    makes="hessians",
    run=run,
    settings=settings,
    needs=("subject", "tokens"),
    enabled=enabled,
)
