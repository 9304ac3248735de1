"""importance: how much every channel, head, neuron and layer of a model matters."""

from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.data.stream import Beginning
from pipeline.distill.next_token import LanguageHead
from pipeline.model.anatomy import Anatomy
from pipeline.model.causal import CausalModel, decoder_of
from pipeline.model.scores import Scores
from pipeline.prune.importance import SCORES, score_named
from pipeline.prune.importance.experts import EXPERT_SCORES
from pipeline.prune.importance.measure import measure
from pipeline.prune.importance.moments import Moments, moments
from pipeline.prune.importance.score import Measured
from pipeline.prune.importance.taylor import gradients
from pipeline.prune.surgery.bias import biased_anatomy
from pipeline.runtime.checkpoint_writer import write_tensors
from pipeline.runtime.device import Device
from pipeline.runtime.layer_streaming import need_memory, placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage

MEANS = "means/means.safetensors"


def settings(config: Config) -> dict:
    """Return the score section, the seed that orders the calibration text, and whether means are kept for biases."""
    return config.score.model_dump() | {"seed": config.seed, "means": config.reinit.bias_compensation}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write scores.safetensors over `score.tokens` calibration tokens, added over ranks.

    Channels and layers are scored by eq. 1 and 4, heads and neurons by `score.kind`, experts by `score.experts`. Where
    biases will compensate, means/ holds the mean inputs of W_O and W_down by module name.

    Raise ValueError before any pass for a family that has no biases to compensate with, and for gradients of a model
    that is too large for the device.
    """
    device, ranks, score = machine.device, machine.ranks, score_named(config.score.kind)
    source = checkpoint(config, inputs["subject"])
    anatomy, means = source.anatomy, config.reinit.bias_compensation
    if means:
        biased_anatomy(anatomy)
    differentiates = "gradients" in score.needs
    if differentiates:
        _need_memory(anatomy, device, config.score.kind)
    model = load(inputs["subject"], machine)
    batches = calibration(config, inputs, config.score.tokens, ranks)
    sequence = batches.packed.sequence
    if (batches.wanted + 1) * sequence < config.score.tokens:
        machine.say(f"importance: the calibration text has only {batches.wanted} sequences of {sequence}; all are used")
    with placed(model, device, False if differentiates else config.device.layer_streaming):
        scores = _forward_scores(config, model, anatomy, batches, machine)
        measured = Measured(
            scores,
            _moments(model, anatomy, batches, machine) if means or "moments" in score.needs else None,
            _gradients(config, model, anatomy, batches, machine) if differentiates else None,
        )
        units = score.compute(anatomy, source, measured)
    if ranks.rank == 0:
        scores.with_units(*units).save(out)
        if means and measured.moments is not None:
            (out / MEANS).parent.mkdir(exist_ok=True)
            write_tensors(out / MEANS, measured.moments.means())


def _forward_scores(
    config: Config, model: CausalModel, anatomy: Anatomy, batches: Beginning, machine: Machine
) -> Scores:
    """Return the scores of eq. 1-4. Raise ValueError where one is not finite."""
    text = machine.progress(batches, len(batches), "importance")
    sums = measure(decoder_of(model), anatomy, text, config.score.aggregation, config.score.norms)
    machine.ranks.sum_(sums.tensors())
    scores = sums.scores(EXPERT_SCORES[config.score.experts])
    broken = next((name for name, values in scores.items() if not torch.isfinite(values).all()), None)
    if broken:
        raise ValueError(
            f"model.path: scores of {broken} are not finite; some of its weights are not, or it overflows in the type "
            "it is computed in; fetch it again"
        )
    return scores


def _moments(model: CausalModel, anatomy: Anatomy, batches: Beginning, machine: Machine) -> Moments:
    result = moments(decoder_of(model), anatomy, machine.progress(batches, len(batches), "moments"))
    machine.ranks.sum_(result.tensors())
    return result


def _gradients(
    config: Config, model: CausalModel, anatomy: Anatomy, batches: Beginning, machine: Machine
) -> dict[str, torch.Tensor]:
    head = LanguageHead(model, config.logits.chunk)
    result = gradients(model, anatomy, machine.progress(batches, len(batches), "gradients"), head)
    machine.ranks.sum_(result.values())  # before absolute values are taken
    return result


def _need_memory(anatomy: Anatomy, device: Device, kind: str) -> None:
    """Raise ValueError where the device cannot hold the model and, in float32, the gradients of its layers."""
    whole, inner = anatomy.parameters()
    needed = {"weights": whole * device.compute_dtype.itemsize, "gradients": inner * 4}
    need_memory(device, needed, f"score.kind={kind}", "set score.kind=activation, fluctuation or magnitude")


STAGE = Stage(
    name="importance",
    makes="scores",
    run=run,
    settings=settings,
    needs=("subject", "tokens"),
    choices={"score.kind": SCORES, "score.experts": EXPERT_SCORES},
    revision=4,
    shows={"scores": ""},
)
