"""Training all weights of a model folder under DeepSpeed, to a model folder: for correction, settling and recovery."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.config.training import Training
from pipeline.costmodel.training_cost import state_bytes
from pipeline.data.packing import Packed
from pipeline.data.stream import stream
from pipeline.distill.holdout import hold_out, share_out
from pipeline.distill.loop import HELD_OUT, Course, train
from pipeline.distill.schedule import learning_rate
from pipeline.model.families import HEAD
from pipeline.runtime.artifacts import write_atomically
from pipeline.runtime.checkpoint import Checkpoint, load_model, write_checkpoint
from pipeline.runtime.disk import need_space
from pipeline.runtime.engine import Engine
from pipeline.runtime.layer_streaming import need_memory

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
STATE_BYTES = 12  # of a parameter in a resumable checkpoint: a float32 weight and two moments
WEIGHT_BYTES = 4
FREE = {
    "micro_batch_size",
    "save_steps",
    "save_total_limit",
    "gradient_checkpointing",
}  # change speed and memory, not the weights


@dataclass(frozen=True)
class Stretch:
    """Which of equal parts of a training this is, and the folder with the metrics of those before (None: the first)."""

    number: int
    count: int
    before: Path | None


ALL = Stretch(1, 1, None)


def train_model(
    section: str,
    config: Config,
    origin: Checkpoint,
    module: Callable[[Callable[[Path], nn.Module]], nn.Module],
    text: Packed,
    out: Path,
    machine,
    stretch: Stretch = ALL,
    after: int = 0,
) -> None:
    """Write the model trained from `origin` as a model folder in float32, and metrics.jsonl; every rank takes part.

    Parts of a training share one schedule, one count of steps and one reading of the text; each begins with an
    optimizer that has seen nothing, and its metrics with those of the parts before.

    `section` names the settings; `module` makes what the engine trains, given a function that loads a model folder in
    the type that is computed in; `after` counts sequences of the text that an earlier training read. An earlier
    attempt's checkpoints in `out` are gone on from, digit for digit.
    """
    asked, ranks = getattr(config, section), machine.ranks
    count, steps = accumulation(section, asked, ranks.world), steps_of(section, asked, config.data.sequence_length)
    first, last = (steps * part // stretch.count for part in (stretch.number - 1, stretch.number))
    parameters = sum(math.prod(shape) for shape in origin.anatomy.shapes().values())
    need_space(out, parameters * (STATE_BYTES * (asked.save_total_limit + 1) + WEIGHT_BYTES))
    text, held = hold_out(text, max(1, asked.eval_tokens // config.data.sequence_length), section)
    engine = _engine(section, config, asked, module, machine, count)
    try:
        done = engine.load(out / CHECKPOINTS)  # of this part
        if done is None:
            engine.take(origin)
        elif done:
            machine.say(f"{section}: goes on after step {first + done} of {steps}")
        if ranks.rank == 0:
            _begin(out / METRICS, done, first, stretch.before)
        ranks.wait(f"{section} begins")
        done = done or 0
        tokens = asked.global_batch_size * text.sequence
        course = Course(
            section,
            last - first,
            count,
            tokens,
            asked.eval_steps,
            asked.save_steps,
            asked.save_total_limit,
            config.seed + first,
        )

        def rate(step: int) -> float:
            return learning_rate(
                asked.lr_scheduler, first + step, steps, asked.learning_rate, asked.warmup_ratio, asked.min_lr_ratio
            )

        def record(metrics: dict[str, float]) -> None:
            so_far = {"step": first + metrics["step"], "tokens": first * tokens + metrics["tokens"]}
            _record(out / METRICS, section, steps, machine, metrics | so_far)

        train(
            engine,
            stream(
                text,
                asked.micro_batch_size,
                ranks.rank,
                ranks.world,
                after + (first + done) * asked.global_batch_size,
                config.seed,
            ),
            share_out(held, asked.micro_batch_size, ranks.rank, ranks.world),
            course,
            rate,
            done,
            out / CHECKPOINTS,
            record,
            lambda steps_left: machine.progress(steps_left, last - first - done, section),
        )
        _write(config, engine, origin, out, ranks.rank)
    finally:
        engine.close()
    ranks.wait(f"{section} written")
    if ranks.rank == 0:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def settings_of(config: Config, asked: Training, apart: set[str]) -> dict[str, Any]:
    """Give what determines the trained weights, without the fields `apart`; how they are spread over ranks does not."""
    return asked.model_dump(exclude=FREE | apart) | {"seed": config.seed, "deepspeed": config.deepspeed.extra}


def accumulation(section: str, asked: Training, world: int) -> int:
    """Give the micro-batches per step and rank; ValueError where the batch is not a whole number of them."""
    batch, micro = asked.global_batch_size, asked.micro_batch_size
    together = micro * world
    if batch % together:
        below, above = batch // together * together, -(-batch // together) * together
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"{section}.global_batch_size is {batch}, not a multiple of {section}.micro_batch_size ({micro}) x "
            f"ranks ({world}) = {together}; nearest: {near}"
        )
    return batch // together


def steps_of(section: str, asked: Training, sequence: int) -> int:
    """Give the optimizer steps; ValueError where the tokens are too few for one."""
    per_step = asked.global_batch_size * sequence
    if asked.tokens < per_step:
        raise ValueError(
            f"{section}.tokens is {asked.tokens}, less than one step of {section}.global_batch_size "
            f"({asked.global_batch_size}) x data.sequence_length ({sequence}) = {per_step} tokens; "
            "raise it or lower the batch"
        )
    steps = asked.tokens // per_step
    return steps if asked.max_steps is None else min(steps, asked.max_steps)


def need_training_memory(section: str, config: Config, module: nn.Module, precision: str, machine) -> None:
    """Raise ValueError where weights, gradients and optimizer alone are more than a device has.

    What raw DeepSpeed settings change of ZeRO, such as offloading, is not known here, and nothing is refused then.
    """
    if "zero_optimization" in config.deepspeed.extra:
        return
    own = sum(parameter.numel() for _, parameter in module.parameters_by_name())
    frozen = sum(parameter.numel() for parameter in module.parameters()) - own
    stage, ranks = config.deepspeed.stage, machine.ranks.world
    needed = state_bytes(own, frozen, precision, stage, ranks)
    what = f"{section} under ZeRO {stage} on {ranks} {'rank' if ranks == 1 else 'ranks'}"
    need_memory(machine.device, needed, what, "raise deepspeed.stage, start more ranks")


def _engine(section: str, config: Config, asked: Training, module: Callable, machine, count: int) -> Engine:
    device = machine.device
    bf16 = asked.precision == "bf16" or (asked.precision == "auto" and device.compute_dtype == torch.bfloat16)
    load = partial(
        load_model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        attention=device.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    trained = module(load)
    need_training_memory(section, config, trained, "bf16" if bf16 else "fp32", machine)
    return Engine(
        trained,
        device,
        machine.ranks,
        stage=config.deepspeed.stage,
        bf16=bf16,
        micro_batch=asked.micro_batch_size,
        accumulation=count,
        clip=asked.max_grad_norm,
        betas=asked.adam_betas,
        weight_decay=asked.weight_decay,
        extra=config.deepspeed.extra,
    )


def _record(path: Path, section: str, steps: int, machine, metrics: dict[str, float]) -> None:
    """Append a step's numbers to the metrics and the tracker; tell those of the held-out text."""
    if machine.ranks.rank == 0:
        with path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    machine.track.log({name: value for name, value in metrics.items() if name != "step"}, metrics["step"], section)
    held = [(name.removeprefix(HELD_OUT), value) for name, value in metrics.items() if name.startswith(HELD_OUT)]
    if held:
        told = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        told += [f"held-out {name.replace('kl', 'KL').replace('_', ' ')} {value:.4f}" for name, value in held]
        machine.say(f"{section}: step {metrics['step']}/{steps}, {', '.join(told)}")


def _begin(path: Path, done: int | None, first: int, before: Path | None) -> None:
    """Forget metrics of steps that will be taken again; where nothing was saved, take those of the part before."""
    if done is None:
        write_atomically(path, (before / METRICS).read_text() if before else "")
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]  # or cut off
    write_atomically(path, "".join(line for line in whole if json.loads(line)["step"] <= first + done))


def _write(config: Config, engine: Engine, origin: Checkpoint, out: Path, rank: int) -> None:
    """Write the model under the names of the origin's tensors; every rank takes part, rank 0 writes."""
    tensors = _tensors(engine, origin)
    if rank == 0:
        write_checkpoint(
            out, origin.config | {"dtype": "float32"}, tensors, config.checkpoint.shard_bytes, origin.folder
        )
    else:
        for _ in tensors:
            pass


def _tensors(engine: Engine, origin: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Give the trained weights, then what the model has beside them, as it is in the origin.

    A stored copy of a tied output matrix is left out: it would be the old one.
    """
    trained = {HEAD} if origin.config.get("tie_word_embeddings") else set()
    for name, tensor in engine.student_state():
        trained.add(name)
        yield name, tensor
    yield from ((name, origin[name]) for name in origin.anatomy.shapes() if name not in trained)
