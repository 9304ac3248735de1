"""bypass: a linear map in place of removed layers, folded into the W_down before them (ReplaceMe)."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config import Config
from pipeline.model.blueprint import to_cut
from pipeline.model.causal import decoder_of
from pipeline.prune.surgery.bypass import check_family, folded, gaps, sums_of
from pipeline.runtime.checkpoint_writer import write_tensors
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage

FILE = "bypass.safetensors"


def enabled(config: Config) -> bool:
    """Return whether removed layers are replaced by a linear map."""
    return config.reinit.bypass


def settings(config: Config) -> dict[str, Any]:
    """Return the text that the maps are fitted on, and how far they are shrunk."""
    return {"tokens": config.reinit.bypass_tokens, "damping": config.restore.damping, "seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the changed tensors of the subject, none where no layer is removed; all ranks measure, rank 0 solves."""
    source = checkpoint(config, inputs["subject"])
    check_family(source.anatomy)
    over = gaps(to_cut(inputs["blueprint"]), len(source.anatomy.sizes.layers))
    changed: dict[str, Tensor] = {}
    if over:
        batches = calibration(config, inputs, config.reinit.bypass_tokens, machine.ranks)
        decoder = decoder_of(load(inputs["subject"], machine))
        shown = machine.progress(batches, len(batches), "bypass")
        for host, sums in sums_of(decoder, source.anatomy, over, shown, machine.device.torch).items():
            machine.ranks.sum_(sums.tensors())
            through, left = sums.map(config.restore.damping)
            changed |= folded(source.anatomy, source, host, through)
            share = 100.0 * (1.0 - left)
            machine.say(f"bypass: layers {host + 1} to {over[host]}, {share:.1f} % of what they add is fitted")
    if machine.ranks.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        write_tensors(out / FILE, changed)


STAGE = Stage(
    name="bypass",
    makes="bypassed",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "blueprint"),
    enabled=enabled,
)
