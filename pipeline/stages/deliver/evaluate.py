"""evaluate: start and student measured on held-out text beside the teacher; teacher and student timed."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pipeline import evaluator
from pipeline.config import Config
from pipeline.evaluation import tasks
from pipeline.evaluation.perplexity import finite, over
from pipeline.evaluation.speed import speeds
from pipeline.model.anatomy import Sizes
from pipeline.runtime.checkpoint import load_tokenizer, open_checkpoint
from pipeline.runtime.device import Device
from pipeline.runtime.layer_streaming import need_memory
from pipeline.runtime.machine import Machine
from pipeline.stages.stage import Inputs, Stage

SPEED = {"speed", "speed_prefill", "speed_decode", "speed_repeats"}


def check(config: Config) -> None:
    """Refuse tasks that cannot be run here, before any work."""
    tasks.check(config.evaluate.tasks)


def settings(config: Config) -> dict:
    """Give what determines the numbers: how much is measured and timed, and on which device."""
    return evaluator.settings(config) | {"speed": config.evaluate.model_dump(include=SPEED)}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write evaluation.json: sizes, quality per text, next-word accuracy, tasks, continuations and speed.

    Beside a perplexity stands how many times the teacher's it is, with the standard error over sequences. ValueError
    before any pass where a model that is to be timed is too large for the device.
    """
    first = machine.ranks.rank == 0
    if config.evaluate.speed:
        _need_memory(config, inputs, machine.device)
    dense = json.loads((inputs["reference_evaluation"] / "dense.json").read_text())
    tokenizer = load_tokenizer(inputs["reference"], config.model.trust_remote_code)
    bench = evaluator.Bench(config, inputs["tokens"], tokenizer, machine)
    measured = {"teacher": dense["figures"]}
    if "recovered" in inputs:
        with bench.placed(inputs["initial_student"]) as model:
            measured["start"] = bench.measure(model, "start", dense["facts"])
        del model  # before there is another
    with bench.placed(inputs["student"]) as model:
        measured["student"] = bench.measure(model, "student", dense["facts"])
        shown = {"teacher": dense} | ({"student": bench.show(model)} if first else {})
    if not first:
        return
    for figures in (measured[who] for who in ("start", "student") if who in measured):
        for name, text in figures.items():
            compared = over(text["losses"], measured["teacher"][name]["losses"])
            text |= {"over_teacher": asdict(compared)} if compared else {}
    folders = {"teacher": inputs["reference"], "student": inputs["student"]}
    samples = zip(bench.prompts(), *(each["samples"] for each in shown.values()), strict=True)
    found = {
        "device": _device(machine),
        "models": {
            who: _sizes(folder, config.model.allow_pickle) | {"kv_bytes_per_token": shown[who]["kv_bytes_per_token"]}
            for who, folder in folders.items()
        },
        "texts": {
            name: facts | {who: figures[name] for who, figures in measured.items()}
            for name, facts in dense["facts"].items()
        },
        "tasks": {who: each["tasks"] for who, each in shown.items()},
        "speed": None,
        "samples": [prompt | {"teacher": dense_, "student": student} for prompt, dense_, student in samples],
    }
    if config.evaluate.speed:
        timed = {"teacher": bench.load(inputs["reference"]), "student": model.to("cpu")}
        found["speed"] = _speed(timed, bench.prompt(config.evaluate.speed_prefill), config.evaluate, machine)
    (out / "evaluation.json").write_text(json.dumps(finite(found), indent=1) + "\n")


def _need_memory(config: Config, inputs: Inputs, device: Device) -> None:
    models = (open_checkpoint(inputs[name], config.model.allow_pickle).anatomy for name in ("reference", "student"))
    weights = max(anatomy.parameters()[0] for anatomy in models) * device.compute_dtype.itemsize
    need_memory(device, {"weights": weights}, "evaluate.speed=true", "set evaluate.speed=false")


def _sizes(folder: Path, allow_pickle: bool) -> dict:
    checkpoint = open_checkpoint(folder, allow_pickle)
    parameters, inner = checkpoint.anatomy.parameters()
    return {
        "parameters": parameters,
        "non_embedding_parameters": inner,
        "checkpoint_bytes": checkpoint.bytes(),
        "shape": _shape(checkpoint.anatomy.sizes),
    }


def _shape(sizes: Sizes) -> dict:
    """Give the widths of a model; one number where all its layers agree, else one a layer."""
    shape = {"layers": len(sizes.layers), "hidden": sizes.hidden}
    for axis in ("heads", "groups", "neurons"):
        widths = [getattr(layer, axis) for layer in sizes.layers]
        shape[axis] = widths[0] if len(set(widths)) == 1 else widths
    return shape | {"head_size": sizes.head_size, "vocabulary": sizes.vocabulary}


def _device(machine) -> dict:
    device = machine.device
    facts = {"kind": device.kind, "name": device.name, "dtype": str(device.compute_dtype).removeprefix("torch.")}
    threads = {"threads": torch.get_num_threads()} if device.kind == "cpu" else {}
    return facts | {"attention": device.attention, "ranks": machine.ranks.world} | threads


def _speed(held: dict[str, torch.nn.Module], prompt: Tensor, asked, machine) -> dict:
    device = machine.device
    measured = speeds(held, prompt, asked.speed_decode, asked.speed_repeats, device.torch, device.synchronise)
    how = {"batch": 1, "prefill": asked.speed_prefill, "decode": asked.speed_decode, "repeats": asked.speed_repeats}
    return how | {who: asdict(speed) for who, speed in measured.items()}


STAGE = Stage(
    name="evaluate",
    makes="evaluation",
    run=run,
    settings=settings,
    needs=("reference", "initial_student", "student", "tokens", "reference_evaluation"),
    optional=("recovered",),
    check=check,
    revision=evaluator.REVISION,
    shows={"evaluation.json": "evaluation.json"},
)
