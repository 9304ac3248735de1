"""score: how much every channel, head, neuron and layer of a model matters, in a pass or two over the same text."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.distill.next_token import LanguageHead
from pipeline.model.anatomy import Anatomy
from pipeline.model.scores import Scores
from pipeline.prune.importance.fluctuation import biased_anatomy, fluctuation, moments
from pipeline.prune.importance.magnitude import magnitude
from pipeline.prune.importance.measure import measure
from pipeline.prune.importance.taylor import gradients, saliency
from pipeline.runtime.checkpoint import Checkpoint, load_model, open_checkpoint, write_tensors
from pipeline.runtime.device import Device
from pipeline.runtime.layer_streaming import need_memory, placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.stage import Inputs, Stage

MEANS = "means/means.safetensors"


def settings(config: Config) -> dict:
    """Give the score section, the seed that orders the calibration text, and whether means are kept for biases."""
    return config.score.model_dump() | {"seed": config.seed, "means": config.reinit.bias_compensation}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write scores.safetensors over `score.tokens` calibration tokens, added over ranks: eq. 1-4, or others in place of
    2 and 3; and, where biases will compensate, means/: the mean inputs of W_O and W_down by module name.

    ValueError before any pass for a family that has no biases to compensate with, and for slopes of a model that is too
    large for the device.
    """
    device, ranks = machine.device, machine.ranks
    source = open_checkpoint(inputs["subject"], config.model.allow_pickle)
    if config.reinit.bias_compensation:
        biased_anatomy(source.anatomy)
    slopes = config.score.kind == "taylor"
    if slopes:
        _need_memory(source.anatomy, device)
    model = load_model(inputs["subject"], device.compute_dtype, device.attention, config.model.trust_remote_code)
    batches = calibration(config, inputs, config.score.tokens, ranks)
    sequence = batches.packed.sequence
    if (batches.wanted + 1) * sequence < config.score.tokens:
        machine.say(f"importance: the calibration text has only {batches.wanted} sequences of {sequence}; all are used")
    with placed(model, device, False if slopes else config.device.layer_streaming):
        sums = measure(
            model.get_decoder(),
            source.anatomy,
            machine.progress(batches, len(batches), "score"),
            config.score.aggregation,
            config.score.norms,
        )
        ranks.sum_(sums.tensors())
        scores = sums.scores()
        _check_finite(scores)
        found = _by_kind(config, source, model, batches, out, machine)
    if found is not None:
        scores = replace(scores, heads=found[0], neurons=found[1])
    if ranks.rank == 0:
        scores.save(out / "scores.safetensors")


def _check_finite(scores: Scores) -> None:
    broken = next((name for name, values in scores.items() if not torch.isfinite(values).all()), None)
    if broken:
        raise ValueError(
            f"model.path: scores of {broken} are not finite; some of its weights are not, or it overflows in the type "
            "it is computed in; fetch it again"
        )


def _need_memory(anatomy: Anatomy, device: Device) -> None:
    """Raise ValueError where the device cannot hold the model and, in float32, the slopes of its layers."""
    whole, inner = anatomy.parameters()
    needed = {"weights": whole * device.compute_dtype.itemsize, "slopes": inner * 4}
    need_memory(device, needed, "score.kind=taylor", "set score.kind=activation, fluctuation or magnitude")


def _by_kind(
    config: Config, source: Checkpoint, model, batches: Iterable[Tensor], out: Path, machine
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """Give the scores of heads [n] and neurons [f] per layer, None where those of the forward pass stay.

    Writes the means on the way. What adds over ranks is added before it is made absolute or multiplied.
    """
    ranks, kind, anatomy, means = machine.ranks, config.score.kind, source.anatomy, config.reinit.bias_compensation
    if means or kind == "fluctuation":
        seen = moments(model.get_decoder(), anatomy, machine.progress(batches, len(batches), "fluctuation"))
        ranks.sum_(seen.tensors())
        if means and ranks.rank == 0:
            (out / MEANS).parent.mkdir(exist_ok=True)
            write_tensors(out / MEANS, seen.means())
        if kind == "fluctuation":
            return fluctuation(anatomy, source, seen)
    if kind == "taylor":
        head = LanguageHead(model, config.logits.chunk)
        slopes = gradients(model, anatomy, machine.progress(batches, len(batches), "taylor"), head)
        ranks.sum_(slopes.values())
        return saliency(anatomy, source, slopes)
    return magnitude(anatomy, source) if kind == "magnitude" else None


STAGE = Stage(
    name="importance",
    makes="scores",
    run=run,
    settings=settings,
    needs=("subject", "tokens"),
    shows={"scores": ""},
)
