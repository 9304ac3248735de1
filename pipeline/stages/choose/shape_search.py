"""shape_search: the student's five widths: of a few shapes that are cut and measured, the fastest of little loss."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.pareto import Limits, Serving
from pipeline.costmodel.pareto import search as search_shapes
from pipeline.costmodel.search_result import SearchResult
from pipeline.costmodel.shapes import ModelShape
from pipeline.data.packing import Packed
from pipeline.data.stream import left_over
from pipeline.evaluation.perplexity import tally
from pipeline.model.hf_config import student_config
from pipeline.model.scores import Scores
from pipeline.model.shape import Shape
from pipeline.model.sizes import LayerSizes
from pipeline.prune.plan import plan_by
from pipeline.prune.surgery.initial_student import begun
from pipeline.runtime.checkpoint import Checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.device import choose
from pipeline.runtime.disk import need_space
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration_text
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage

SCRATCH = "student"  # in the stage's folder: the student that is measured
LEDGER = "losses.jsonl"  # in the stage's folder until it is complete
PLOT = "pareto.png"


@dataclass(frozen=True)
class Measured:
    """The loss of a student of a shape right after cutting, in nats per token."""

    shape: Shape
    loss: float


def check(config: Config) -> None:
    """Refuse a shape that is both given and searched, and a search among some axes."""
    if not enabled(config):
        return
    if config.shape.given:
        raise ValueError("recipe.shape: search, but shape.* gives the shape; limit a search by budget.* instead")
    for name in set(config.budget.sized) - {"parameters"}:
        raise ValueError(
            f"budget.{name}: recipe.shape=search is limited by budget.parameters and by what the chip model predicts, "
            "such as budget.memory_gb; set one of these, or recipe.shape=given"
        )
    if config.budget.axes != "all":
        raise ValueError(
            f"budget.axes: {config.budget.axes}, but recipe.shape=search considers all axes; set budget.axes=all, or "
            "recipe.shape=given"
        )


def enabled(config: Config) -> bool:
    """Return whether the shape is searched."""
    return config.recipe.shape == "search"


def settings(config: Config) -> dict[str, Any]:
    """Return the search, its limits, the chip, how a student is planned and cut, and the device that measures it."""
    return {
        "search": config.shape_search.model_dump(),
        "limits": config.budget.limits,
        "chip": config.device.chip_facts,
        "plan": config.plan.model_dump(),
        "reinit": config.reinit.model_dump(include={"slnp", "gain_compensation", "bias_compensation"}),
        "seed": config.seed,
        "device": {"kind": choose(config.device.kind), "attention": config.device.attention},
    }


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write shape.json, and how it was found: search.json and pareto.png.

    Raise ValueError where no shape keeps to the limits, or scoring left no text to measure losses on.
    """
    source = checkpoint(config, inputs["subject"])
    scores = Scores.load(inputs["scores"])
    text = calibration_text(inputs)
    rows = _rows(text, scores.tokens, config)
    if len(rows) < config.shape_search.tokens // text.sequence:
        machine.say(f"shape_search: scoring left {len(rows)} sequences of {text.sequence} tokens; all are measured")
    need_space(out, source.bytes())
    size = config.calibration.batch_size

    def measure(shape: ModelShape) -> float:
        batches = (_batch(text, rows[at : at + size]) for at in range(0, len(rows), size))
        model = _student(config, shape, source, scores, out / SCRATCH, machine)
        with placed(model, machine.device, config.device.layer_streaming):
            total = tally(model, batches, config.logits.chunk)
        del model  # it may still map the file that is deleted next
        shutil.rmtree(out / SCRATCH)
        return float(total[0] / total[2])

    ledger = Ledger(out / LEDGER, Measured)
    result = search_shapes(
        Chip(**config.device.chip_facts),
        ModelShape.of(source.anatomy, config.reinit.bias_compensation, config.plan.keep_first),
        Serving(**config.shape_search.serving),
        Limits(**config.budget.limits),
        config.shape_search.candidates,
        config.shape_search.tolerance,
        _resumed(measure, ledger),
        lambda shapes: machine.progress(shapes, len(shapes), "shape_search"),
    )
    from pipeline.costmodel import pareto_plot  # imports matplotlib

    pareto_plot.draw(result, out / PLOT)
    machine.track.image(out / PLOT, "search/pareto")
    SearchResult.of(result).save(out)
    Shape(**result.picked.shape.axes()).save(out)
    ledger.discard()
    faster = result.teacher.seconds(result.serving) / result.picked.seconds(result.serving)
    lowest = min(candidate.loss for candidate in result.candidates if candidate.loss is not None)
    machine.say(
        f"shape_search: {result.picked.shape.axes()} keeps {result.picked.kept:.1%} of the parameters outside the "
        f"embeddings, is predicted to be {faster:.2f} times as fast on {result.chip}, and has a loss of "
        f"{result.picked.loss:.3f} right after cutting; the lowest of {len(result.candidates)} measured is "
        f"{lowest:.3f}; {result.costed.aligned} aligned shapes were costed"
    )


def _rows(text: Packed, scored: int, config: Config) -> list[int]:
    """Return the rows to measure on, spread over those that scoring, which read `scored` tokens, did not read."""
    left = left_over(text, -(-scored // text.sequence), config.seed)
    if not left:
        raise ValueError(
            f"score.tokens: {config.score.tokens} tokens are all {len(text)} sequences of the calibration text, which "
            "leaves a search none to measure on; lower it, or give a longer text"
        )
    count = min(max(1, config.shape_search.tokens // text.sequence), len(left))
    return [left[place * len(left) // count] for place in range(count)]


def _batch(text: Packed, rows: list[int]) -> Tensor:
    return torch.from_numpy(np.stack([text[row] for row in rows]).astype(np.int64))


def _student(
    config: Config, shape: ModelShape, source: Checkpoint, scores: Scores, scratch: Path, machine: Machine
) -> nn.Module:
    """Return a student planned from the scores, cut and re-initialised, by way of a model folder `scratch`."""
    anatomy = source.anatomy
    widths = [LayerSizes(shape.heads, shape.groups, shape.neurons)] * len(anatomy.sizes.layers)
    blueprint = plan_by(anatomy, scores, widths, shape.hidden, shape.layers, **config.plan.policy, seed=config.seed)
    reinit = config.reinit.model_dump(include={"slnp", "gain_compensation"})
    stream = begun(anatomy, blueprint, source, source.config, **reinit)
    shutil.rmtree(scratch, ignore_errors=True)
    write_checkpoint(scratch, student_config(source.config, anatomy, blueprint), stream, config.checkpoint.shard_bytes)
    return load(scratch, machine)


def _resumed(measure: Callable[[ModelShape], float], ledger: Ledger[Measured]) -> Callable[[ModelShape], float]:
    """Return a measure that records each loss and measures no shape whose loss is recorded."""
    losses = {entry.shape: entry.loss for entry in ledger.entries}

    def measured(shape: ModelShape) -> float:
        key = Shape(**shape.axes())
        if key not in losses:
            losses[key] = measure(shape)
            ledger.append(Measured(key, losses[key]))
        return losses[key]

    return measured


STAGE = Stage(
    name="shape_search",
    makes="shape",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "scores"),
    enabled=enabled,
    check=check,
    all_ranks=False,
    resumable=True,  # every loss is on disk as soon as it is measured
    shows={"shape.json": Shape.FILE, "search.json": SearchResult.FILE, PLOT: PLOT},
)
