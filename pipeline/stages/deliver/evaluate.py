"""evaluate: the student, before and after recovery, on held-out text beside the reference; both are timed."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import evaluator
from pipeline.config import Config
from pipeline.evaluation import tasks
from pipeline.evaluation.perplexity import over
from pipeline.evaluation.results import Evaluation, ReferenceEvaluation
from pipeline.evaluation.speed import speeds
from pipeline.model.sizes import Sizes
from pipeline.runtime.layer_streaming import need_memory
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_tokenizer
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.texts import check_positions_of_source

SPEED = {"speed", "speed_prefill", "speed_decode", "speed_repeats"}
ANSWERS = {"answers", "answer_tokens"}


def check(config: Config) -> None:
    """Refuse tasks that cannot be run here, and texts beyond the model's positions, before any work."""
    tasks.check(evaluator.tasks_of(config))
    if config.evaluate.speed:
        count = config.evaluate.speed_prefill + config.evaluate.speed_decode
        check_positions_of_source(config, "evaluate.speed_prefill + evaluate.speed_decode", count)
    if config.report.samples:
        check_positions_of_source(config, "report.sample_tokens", config.report.sample_tokens)
    if config.data.answers and config.evaluate.answers:
        check_positions_of_source(config, "evaluate.answer_tokens", config.evaluate.answer_tokens)


def settings(config: Config) -> dict[str, Any]:
    """Return what determines the figures: how much is measured and timed, and on which device."""
    own = {"speed": SPEED, "answers": ANSWERS, "draft": {"draft"}}
    return evaluator.settings(config) | {
        name: config.evaluate.model_dump(include=fields) for name, fields in own.items()
    }


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write evaluation.json: sizes, quality by text, next-word accuracy, tasks, continuations and speed.

    Where the assistant's turns are marked (`data.loss_on`), also perplexity, KL and greedy answers on these alone, for
    the student and, as `start`, for the student before recovery. Each perplexity comes with its ratio to the
    reference's and the standard error of the ratio over sequences. Raise ValueError before any pass for a model that is
    to be timed and too large for the device, and for a student that cannot be measured on the requested tasks.
    """
    tasks.check_form(evaluator.tasks_of(config), inputs["student"])
    if config.evaluate.speed:
        _need_memory(config, inputs, machine)
    reference = ReferenceEvaluation.load(inputs["reference_evaluation"])
    bench = _bench(config, inputs, machine)
    figures: dict[str, dict[str, Any]] = {"teacher": reference.figures}
    if "recovered" in inputs:
        with bench.placed(inputs["initial_student"]) as model:
            figures["start"] = bench.measure(model, "start", reference.facts)
        del model  # before the next is loaded
    answers = _answers(bench, inputs, machine)
    drafts = _drafts(config, bench, inputs, machine)
    with bench.placed(inputs["student"]) as model:
        figures["student"] = bench.measure(model, "student", reference.facts)
        if machine.ranks.rank:
            return
        behaviours = {"teacher": reference.behaviour, "student": bench.behaviour(model, inputs["student"])}
    for who, texts in figures.items():
        if who != "teacher":
            _compare(texts, reference.figures, paired=bench.original is None)
    folders = {"teacher": inputs["reference"], "student": inputs["student"]}
    samples = zip(bench.prompts(), *(each.samples for each in behaviours.values()), strict=True)
    speed = None
    if config.evaluate.speed:
        timed = {"teacher": bench.load(inputs["reference"]), "student": model.to("cpu")}
        speed = _speed(timed, bench.prompt(config.evaluate.speed_prefill), config, machine)
    Evaluation(
        device=_device(machine),
        models={
            who: _sizes(config, folder) | {"kv_bytes_per_token": behaviours[who].kv_bytes_per_token}
            for who, folder in folders.items()
        },
        texts={
            name: facts
            | {who: texts[name] for who, texts in figures.items()}
            | ({"assistant": answers[name]} if name in answers else {})
            | ({"draft": drafts[name]} if name in drafts else {})
            for name, facts in reference.facts.items()
        },
        tasks={who: each.tasks for who, each in behaviours.items()},
        speed=speed,
        samples=tuple(
            {"text": each.text, "prompt": each.prompt, "reference": each.reference, "teacher": first, "student": second}
            for each, first, second in samples
        ),
    ).save(out)


def _bench(config: Config, inputs: Inputs, machine: Machine) -> evaluator.Bench:
    """Return the bench of the student: the reference's, or its own where it has another tokenizer."""
    trusted = config.model.trust_remote_code
    tokenizer = load_tokenizer(inputs["reference"], trusted)
    bench = evaluator.Bench(config, inputs["reference_tokens"], tokenizer, machine)
    if inputs["tokens"] == inputs["reference_tokens"]:
        return bench
    return evaluator.Bench(config, inputs["tokens"], load_tokenizer(inputs["student"], trusted), machine, bench)


def _answers(bench: evaluator.Bench, inputs: Inputs, machine: Machine) -> dict[str, dict[str, Any]]:
    """Return the comparison on the assistant's turns by text; every rank takes part."""
    if not any(packed.marked for packed in bench.texts.values()):
        return {}
    if bench.original is not None:
        machine.say("answers: not compared, as the student has another vocabulary than its teacher")
        return {}
    with bench.placed(inputs["reference"]) as reference:
        with bench.placed(inputs["student"]) as student:
            found = bench.answers(reference, student, "answers")
        if "recovered" in inputs:
            with bench.placed(inputs["initial_student"]) as start:
                before = bench.answers(reference, start, "answers before recovery")
            found = {name: numbers | {"start": before[name]} for name, numbers in found.items()}
    return found


def _drafts(config: Config, bench: evaluator.Bench, inputs: Inputs, machine: Machine) -> dict[str, dict[str, Any]]:
    """Return the acceptance of the student's drafts by text, where it is requested; every rank takes part."""
    if not config.evaluate.draft:
        return {}
    with bench.placed(inputs["reference"]) as reference, bench.placed(inputs["student"]) as student:
        return bench.drafts(reference, student)


def _compare(texts: Mapping[str, dict[str, Any]], reference: Mapping[str, dict[str, Any]], paired: bool) -> None:
    """Add to the figures of each text the ratio of its perplexity to the reference's."""
    for name, text in texts.items():
        ratio = over(text["losses"], reference[name]["losses"], paired)
        if ratio is not None:
            text["over_teacher"] = asdict(ratio)


def _need_memory(config: Config, inputs: Inputs, machine: Machine) -> None:
    """Raise ValueError where the device cannot hold the larger of the two models."""
    models = (checkpoint(config, inputs[name]).anatomy for name in ("reference", "student"))
    weights = max(anatomy.parameters()[0] for anatomy in models) * machine.device.compute_dtype.itemsize
    need_memory(machine.device, {"weights": weights}, "evaluate.speed=true", "set evaluate.speed=false")


def _sizes(config: Config, folder: Path) -> dict[str, Any]:
    """Return the parameters, bytes and widths of a model folder."""
    source = checkpoint(config, folder)
    anatomy = source.anatomy
    parameters, inner = anatomy.parameters()
    experts = {"experts": anatomy.sizes.carried["e"]} if anatomy.routing else {}
    return {
        "parameters": parameters,
        "active_parameters": anatomy.active_parameters()[0],
        "non_embedding_parameters": inner,
        "checkpoint_bytes": source.bytes(),
        "shape": _shape(anatomy.sizes) | experts,
    }


def _shape(sizes: Sizes) -> dict[str, Any]:
    """Return the widths of a model: one number where all layers agree, else one for each layer."""
    shape: dict[str, Any] = {"layers": len(sizes.layers), "hidden": sizes.hidden}
    for axis in ("heads", "groups", "neurons"):
        widths = [getattr(layer, axis) for layer in sizes.layers]
        shape[axis] = widths[0] if len(set(widths)) == 1 else widths
    return shape | {"head_size": sizes.head_size, "vocabulary": sizes.vocabulary}


def _device(machine: Machine) -> dict[str, Any]:
    """Return what the figures were measured on."""
    device = machine.device
    facts = {
        "kind": device.kind,
        "name": device.name,
        "dtype": str(device.compute_dtype).removeprefix("torch."),
        "attention": device.attention,
        "ranks": machine.ranks.world,
    }
    if device.kind == "cpu":
        facts["threads"] = torch.get_num_threads()
    return facts


def _speed(models: dict[str, nn.Module], prompt: Tensor, config: Config, machine: Machine) -> dict[str, Any]:
    """Return the prefill and decode speeds of models, and how they were measured."""
    device, section = machine.device, config.evaluate
    measured = speeds(models, prompt, section.speed_decode, section.speed_repeats, device.torch, device.synchronise)
    return {
        "batch": 1,
        "prefill": section.speed_prefill,
        "decode": section.speed_decode,
        "repeats": section.speed_repeats,
        **{who: asdict(speed) for who, speed in measured.items()},
    }


STAGE = Stage(
    name="evaluate",
    makes="evaluation",
    run=run,
    settings=settings,
    needs=("reference", "initial_student", "student", "tokens", "reference_tokens", "reference_evaluation"),
    optional=("recovered", "onpolicy_student"),
    check=check,
    revision=evaluator.REVISION,
    shows={"evaluation.json": Evaluation.FILE},
)
