"""search: the student's five widths, the fastest of a few that were really cut and lost little by it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.costmodel import pareto_plot
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.pareto import Limits, Serving
from pipeline.costmodel.pareto import search as search_shapes
from pipeline.costmodel.shapes import ModelShape
from pipeline.data.packing import Packed
from pipeline.data.stream import left_over
from pipeline.evaluation.perplexity import tally
from pipeline.model.anatomy import LayerSizes
from pipeline.model.hf_config import student_config
from pipeline.model.scores import Scores
from pipeline.prune.plan import plan_by
from pipeline.prune.surgery.initial_student import begun
from pipeline.runtime.artifacts import write_atomically
from pipeline.runtime.checkpoint import Checkpoint, load_model, open_checkpoint, write_checkpoint
from pipeline.runtime.device import choose
from pipeline.runtime.disk import need_space
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration_text
from pipeline.stages.stage import Inputs, Stage

SCRATCH = "student"  # the one cut student there is at a time


def check(config: Config) -> None:
    """Refuse a shape that is given and searched, too, and a search among some axes: all are sifted."""
    if not enabled(config):
        return
    if config.shape.given:
        raise ValueError("recipe.shape is search, but shape.* gives the shape; limit a search by budget.* instead")
    if config.budget.axes != "all":
        raise ValueError(
            f"budget.axes is {config.budget.axes}, but recipe.shape=search sifts all axes; set budget.axes=all, or "
            "recipe.shape=given"
        )


def enabled(config: Config) -> bool:
    """Whether the shape is searched."""
    return config.recipe.shape == "search"


def settings(config: Config) -> dict:
    """Give the search, its limits and what else decides which shapes are possible, the chip, how a student is planned
    and cut, and what measures it."""
    biased = {"bias_compensation": True} if config.reinit.bias_compensation else {}
    return biased | {
        "search": config.shape_search.model_dump(),
        "limits": config.budget.limits,
        "chip": config.device.chip_facts,
        "plan": config.plan.model_dump(),
        "reinit": config.reinit.model_dump(include={"slnp", "gain_compensation"}),
        "seed": config.seed,
        "device": {"kind": choose(config.device.kind), "attention": config.device.attention},
    }


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write shape.json, and how it was found: search.json, pareto.png and losses.json.

    ValueError where no shape keeps to the limits, or scoring left no text to measure losses on.
    """
    source = open_checkpoint(inputs["subject"], config.model.allow_pickle)
    scores = Scores.load(inputs["scores"] / "scores.safetensors")
    text = calibration_text(inputs)
    rows = _rows(text, scores.tokens, config)
    if len(rows) < config.shape_search.tokens // text.sequence:
        machine.say(f"search: scoring left {len(rows)} sequences of {text.sequence} of the text; all are measured")
    teacher = ModelShape.of(source.anatomy, config.reinit.bias_compensation)
    need_space(out, source.bytes())

    def measure(shape: ModelShape) -> float:
        batches = (
            _batch(text, rows[at : at + config.calibration.batch_size])
            for at in range(0, len(rows), config.calibration.batch_size)
        )
        model = _student(config, shape, source, scores, out / SCRATCH, machine)
        with placed(model, machine.device, config.device.layer_streaming):
            total = tally(model, batches, config.logits.chunk)
        del model  # it may still read its file
        shutil.rmtree(out / SCRATCH)
        return float(total[0] / total[2])

    asked = config.shape_search
    found = search_shapes(
        Chip(**config.device.chip_facts),
        teacher,
        Serving(**asked.serving),
        Limits(**config.budget.limits),
        asked.candidates,
        asked.tolerance,
        _remembered(measure, out / "losses.json"),
        lambda shapes: machine.progress(shapes, len(shapes), "search"),
    )
    pareto_plot.draw(found, out / "pareto.png")
    machine.track.image(out / "pareto.png", "search/pareto")
    (out / "search.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
    (out / "shape.json").write_text(json.dumps(found.picked.shape.axes(), indent=2))
    faster = found.teacher.seconds(found.serving) / found.picked.seconds(found.serving)
    machine.say(
        f"search: {found.picked.shape.axes()} keeps {found.picked.kept:.1%} of the parameters outside the embeddings, "
        f"is predicted {faster:.2f} times as fast on {found.chip}, and has a loss of {found.picked.loss:.3f} right "
        f"after cutting; the lowest of {len(found.candidates)} measured is "
        f"{min(each.loss for each in found.candidates):.3f}, and {found.costed.aligned} aligned shapes were costed"
    )


def _rows(text: Packed, scored: int, config: Config) -> list[int]:
    """Give the rows to measure on, spread over all that scoring, which read `scored` tokens, left of the text."""
    left = left_over(text, -(-scored // text.sequence), config.seed)
    if not left:
        raise ValueError(
            f"score.tokens is {config.score.tokens}: scoring read all {len(text)} sequences of the calibration text, "
            "which leaves a search none to measure on; lower it, or give a longer text"
        )
    wanted = min(max(1, config.shape_search.tokens // text.sequence), len(left))
    return [left[place * len(left) // wanted] for place in range(wanted)]


def _batch(text: Packed, rows: list[int]) -> Tensor:
    return torch.from_numpy(np.stack([text[row] for row in rows]).astype(np.int64))


def _student(
    config: Config, shape: ModelShape, source: Checkpoint, scores: Scores, scratch: Path, machine
) -> torch.nn.Module:
    """Give a student planned from the shared scores, cut and re-initialised, by way of a model folder `scratch`."""
    anatomy, device = source.anatomy, machine.device
    widths = [LayerSizes(shape.heads, shape.groups, shape.neurons)] * len(anatomy.sizes.layers)
    blueprint = plan_by(anatomy, scores, widths, shape.hidden, shape.layers, **config.plan.policy, seed=config.seed)
    asked = config.reinit.model_dump(include={"slnp", "gain_compensation"})
    stream = begun(anatomy, blueprint, source, source.config, **asked)
    shutil.rmtree(scratch, ignore_errors=True)
    write_checkpoint(scratch, student_config(source.config, anatomy, blueprint), stream, config.checkpoint.shard_bytes)
    return load_model(scratch, device.compute_dtype, device.attention, config.model.trust_remote_code)


def _remembered(measure: Callable[[ModelShape], float], path: Path) -> Callable[[ModelShape], float]:
    """Give a measure that writes down each loss in a file, and measures no shape that has one there."""
    losses: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def remembered(shape: ModelShape) -> float:
        name = " ".join(f"{axis}={width}" for axis, width in shape.axes().items())
        if name not in losses:
            losses[name] = measure(shape)
            write_atomically(path, json.dumps(losses, indent=1) + "\n")
        return losses[name]

    return remembered


STAGE = Stage(
    name="shape_search",
    makes="shape",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "scores"),
    enabled=enabled,
    check=check,
    all_ranks=False,
    resumable=True,  # what was measured is kept in losses.json
    shows={"shape.json": "shape.json", "search.json": "search.json", "pareto.png": "pareto.png"},
)
