"""gram: the second moments of what W_O and W_down read, which removal order and restoration need."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config
from pipeline.model.anatomy import Anatomy
from pipeline.prune.second_order.hessian import gram, projections
from pipeline.runtime.checkpoint import load_model, open_checkpoint, write_tensors
from pipeline.runtime.disk import need_space
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.stage import Inputs, Stage

BYTES = 8  # of an entry, in memory and on disk


def enabled(config: Config) -> bool:
    """Whether units go by optimal brain surgeon, or outputs are restored."""
    return config.restore.outputs or config.restore.order == "obs"


def settings(config: Config) -> dict:
    """Give the number of tokens, their batches, and the seed that orders the calibration text."""
    return {"tokens": config.restore.tokens, "seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write layer-NNNNN.safetensors: H = XᵀX in float64 by projection name, over `restore.tokens`, added over ranks."""
    device, ranks = machine.device, machine.ranks
    anatomy = open_checkpoint(inputs["subject"], config.model.allow_pickle).anatomy
    bytes_of = [_bytes(anatomy, layer) for layer in range(len(anatomy.sizes.layers))]
    need_space(out, sum(bytes_of))
    model = load_model(inputs["subject"], device.compute_dtype, device.attention, config.model.trust_remote_code)
    batches = calibration(config, inputs, config.restore.tokens, ranks)
    if ranks.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    with placed(model.get_decoder(), device, config.device.layer_streaming) as decoder:
        for layers in _passes(bytes_of, config.restore.memory):
            label = f"gram of layers {layers[0]} to {layers[-1]}"
            sums = gram(decoder, anatomy, machine.progress(batches, len(batches), label), layers, stream=False)
            ranks.sum_(sums.tensors())
            if ranks.rank == 0:
                for layer in layers:
                    names = [module.format(layer=layer) for module in projections(anatomy).values()]
                    write_tensors(out / f"layer-{layer:05d}.safetensors", {name: sums.inputs[name] for name in names})


def _bytes(anatomy: Anatomy, layer: int) -> int:
    return BYTES * sum(anatomy.sizes.length(axis, layer) ** 2 for axis in projections(anatomy))


def _passes(bytes_of: list[int], limit: float) -> Iterator[list[int]]:
    """Give runs of layers, one at least in each, whose matrices fit in `limit` bytes."""
    run, size = [], 0
    for layer, needed_here in enumerate(bytes_of):
        if run and size + needed_here > limit:
            yield run
            run, size = [], 0
        run.append(layer)
        size += needed_here
    yield run


STAGE = Stage(
    name="hessian",
    makes="hessians",
    run=run,
    settings=settings,
    needs=("subject", "tokens"),
    enabled=enabled,
)
