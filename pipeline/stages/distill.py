"""distill: the student recovers by learning its teacher's distributions; interrupted, it goes on where it was."""

import json
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import stream
from pipeline.distill.distiller import Distiller, Match, Objective
from pipeline.distill.holdout import hold_out, share_out
from pipeline.distill.loop import Course, train
from pipeline.distill.schedule import learning_rate
from pipeline.model.blueprint import Blueprint
from pipeline.runtime.artifacts import need_space, write_atomically
from pipeline.runtime.checkpoint import Checkpoint, load_model, open_checkpoint, write_checkpoint
from pipeline.runtime.engine import Engine
from pipeline.runtime.ranks import place

MAKES = "student"
NEEDS = ("teacher", "start", "tokens")
OPTIONAL = ("blueprint",)  # says which teacher states the hidden-state terms compare with
EVERY_RANK = True
RESUMES = True  # goes on from the checkpoints an interrupted attempt left
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
STATE_BYTES = 12  # of a parameter in a resumable checkpoint: a float32 weight and two moments
WEIGHT_BYTES = 4
FREE = {"micro_batch", "save_every", "keep", "gradient_checkpointing"}  # change speed and memory, not the student


def check(config: Config) -> None:
    """Refuse batches that cannot be divided and runs shorter than a step, before any work."""
    _accumulation(config, place()[1])
    _steps(config)


def settings(config: Config) -> dict:
    """Give what determines the student; how it is spread over ranks and memory does not."""
    asked = config.distill.model_dump(exclude=FREE | {"loss"})
    loss = config.distill.loss.model_dump(exclude={"chunk"})
    return asked | {"loss": loss, "seed": config.seed, "deepspeed": config.deepspeed.extra}


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write the recovered student as a model folder in float32, and metrics.jsonl."""
    asked, ranks = config.distill, machine.ranks
    accumulation, steps = _accumulation(config, ranks.world), _steps(config)
    start = open_checkpoint(inputs["start"])
    parameters = sum(math.prod(shape) for shape in start.anatomy.shapes().values())
    need_space(out, parameters * (STATE_BYTES * (asked.keep + 1) + WEIGHT_BYTES))
    text, held = hold_out(Packed(inputs["tokens"] / "recovery"), max(1, asked.validate_tokens // config.data.sequence))
    bf16 = _bf16(config, machine.device)
    engine = _engine(config, inputs, machine, accumulation, bf16)
    try:
        done = engine.load(out / CHECKPOINTS)
        if done is None:
            engine.take(start)
        elif done:
            machine.say(f"distill: goes on after step {done} of {steps}")
        if ranks.rank == 0:
            _truncate(out / METRICS, done)
        ranks.wait("distill begins")
        done = done or 0
        course = Course(
            steps,
            accumulation,
            asked.batch * text.sequence,
            asked.validate_every,
            asked.save_every,
            asked.keep,
            config.seed,
        )
        train(
            engine,
            stream(text, asked.micro_batch, ranks.rank, ranks.world, done * asked.batch, config.seed),
            share_out(held, asked.micro_batch, ranks.rank, ranks.world),
            course,
            lambda step: learning_rate(asked.schedule, step, steps, asked.learning_rate, asked.warmup, asked.floor),
            done,
            out / CHECKPOINTS,
            partial(_record, out / METRICS, steps, machine),
            lambda steps_left: machine.progress(steps_left, steps - done, "distill"),
        )
        _write(config, engine, start, inputs, out, ranks.rank)
    finally:
        engine.close()
    ranks.wait("student written")
    if ranks.rank == 0:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _engine(config: Config, inputs: dict[str, Path], machine, accumulation: int, bf16: bool) -> Engine:
    asked, device = config.distill, machine.device
    objective = Objective(**asked.loss.model_dump())
    load = partial(
        load_model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        attention=device.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    student, teacher = load(inputs["start"]), load(inputs["teacher"])
    return Engine(
        Distiller(teacher, student, objective, _match(inputs), asked.gradient_checkpointing),
        device,
        machine.ranks,
        stage=config.deepspeed.stage,
        bf16=bf16,
        micro_batch=asked.micro_batch,
        accumulation=accumulation,
        clip=asked.clip,
        betas=asked.betas,
        weight_decay=asked.weight_decay,
        extra=config.deepspeed.extra,
    )


def _match(inputs: dict[str, Path]) -> Match | None:
    if "blueprint" not in inputs:
        return None
    blueprint = Blueprint.load(inputs["blueprint"] / "blueprint.json")
    return Match(tuple((layer, plan.host) for layer, plan in enumerate(blueprint.layers)), blueprint.channels)


def _bf16(config: Config, device) -> bool:
    if config.distill.precision == "auto":
        return device.compute_dtype == torch.bfloat16
    return config.distill.precision == "bf16"


def _accumulation(config: Config, world: int) -> int:
    """Give the micro-batches per step and rank; ValueError where the batch is not a whole number of them."""
    batch, micro = config.distill.batch, config.distill.micro_batch
    together = micro * world
    if batch % together:
        below, above = batch // together * together, -(-batch // together) * together
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"distill.batch is {batch}, not a multiple of distill.micro_batch ({micro}) x ranks ({world}) = {together};"
            f" nearest: {near}"
        )
    return batch // together


def _steps(config: Config) -> int:
    per_step = config.distill.batch * config.data.sequence
    if config.distill.tokens < per_step:
        raise ValueError(
            f"distill.tokens is {config.distill.tokens}, less than one step of distill.batch ({config.distill.batch}) x"
            f" data.sequence ({config.data.sequence}) = {per_step} tokens; raise it or lower the batch"
        )
    return config.distill.tokens // per_step


def _record(path: Path, steps: int, machine, metrics: dict[str, float]) -> None:
    """Append a step's numbers to the metrics and the tracker; tell the held-out KL."""
    if machine.ranks.rank == 0:
        with path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    machine.track.log({name: value for name, value in metrics.items() if name != "step"}, metrics["step"], "distill")
    if "held_out_kl" in metrics:
        loss = f"loss {metrics['loss']:.4f}, " if "loss" in metrics else ""
        machine.say(f"distill: step {metrics['step']}/{steps}, {loss}held-out KL {metrics['held_out_kl']:.4f}")


def _truncate(path: Path, done: int | None) -> None:
    """Forget metrics of steps that will be taken again; all of them where nothing was saved."""
    if not path.exists():
        return
    lines = [] if done is None else path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
    write_atomically(path, "".join(line for line in whole if json.loads(line)["step"] <= done))


def _write(config: Config, engine: Engine, start: Checkpoint, inputs: dict[str, Path], out: Path, rank: int) -> None:
    """Write the student under the names of the start's tensors; every rank takes part, rank 0 writes."""
    tensors = _tensors(engine, start)
    if rank == 0:
        kind = start.config | {"dtype": "float32"}
        write_checkpoint(out, kind, tensors, config.export.shard_bytes, inputs["start"])
    else:
        for _ in tensors:
            pass


def _tensors(engine: Engine, start: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Give the trained weights, then what the start holds beside them (buffers), as it is."""
    trained = set()
    for name, tensor in engine.student_state():
        trained.add(name)
        yield name, tensor
    yield from ((name, start[name]) for name in start if name not in trained)
