"""Stage onpolicy: train the student on its own answers, towards its teacher's distributions on them, after recovery."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.prompts import Prompts
from pipeline.data.stream import Rows, stream
from pipeline.distill.chunk import method_of
from pipeline.distill.distiller import Objective
from pipeline.distill.divergences import DIVERGENCES
from pipeline.distill.on_policy import Drawing, OnPolicyDistiller, answered
from pipeline.distill.schedule import answer_length
from pipeline.distill.selection import Selection
from pipeline.runtime.checkpoint import open_checkpoint, read_config
from pipeline.runtime.device import choose
from pipeline.runtime.engine import Engine
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import generation_of
from pipeline.runtime.ranks import place
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.texts import check_positions_of_source
from pipeline.training import Source, train_model
from pipeline.training_settings import accumulation, check_text, sequences_of, settings_of


def enabled(config: Config) -> bool:
    """Return whether the student is trained on its own answers."""
    return config.onpolicy.tokens > 0


def check(config: Config) -> None:
    """Refuse a kernel that cannot run, batches that do not divide, runs below a step, and answers that are too long."""
    if not enabled(config):
        return
    options = config.onpolicy
    method_of(options.divergence, config.distill.loss.kernel, choose(config.device.kind))
    accumulation("onpolicy", options, place()[1])
    steps_of(config)
    longest = options.prompt_tokens + options.max_new_tokens
    check_positions_of_source(config, "onpolicy.prompt_tokens + onpolicy.max_new_tokens", longest)


def needs_also(config: Config) -> tuple[str, ...]:
    """Return the recovered student, where the recipe recovers it; a student cut elsewhere may come recovered."""
    return ("recovered",) if "distill" in config.recipe.stages else ()


def steps_of(config: Config) -> int:
    """Return the number of optimizer steps; ValueError where the tokens are too few for one."""
    options = config.onpolicy
    batch, ends = options.global_batch_size, options.min_new_tokens + options.max_new_tokens
    steps = 2 * options.tokens // (batch * ends)
    if not steps:
        raise ValueError(
            f"onpolicy.tokens: {options.tokens} is less than one step of onpolicy.global_batch_size ({batch}) answers "
            f"of {ends / 2:g} tokens, the mean of onpolicy.min_new_tokens and onpolicy.max_new_tokens; raise it or "
            "lower the batch"
        )
    return steps if options.max_steps is None else min(steps, options.max_steps)


def settings(config: Config) -> dict[str, Any]:
    """Return what determines the student; how the work is spread over ranks and memory does not."""
    skipped = _skipped(config)
    return settings_of(config, config.onpolicy, set()) | ({"after": skipped} if skipped else {})


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the student as a model folder in float32, recovery.json, and metrics.jsonl."""
    options = config.onpolicy
    student = inputs.get("recovered", inputs["initial_student"])
    text = Packed(inputs["tokens"] / "recovery")
    objective = Objective(
        options.divergence,
        options.mix,
        temperature=1.0,
        cross_entropy=0.0,
        hidden=0.0,
        embedding=0.0,
        chunk=config.logits.chunk,
        kernel=config.distill.loss.kernel,
    )
    stop = _ends(inputs["teacher"]) | {text.index["after"]}
    train_model(
        "onpolicy",
        config,
        open_checkpoint(student),
        lambda load: OnPolicyDistiller(
            load(inputs["teacher"]), load(student), objective, options.gradient_checkpointing, text.marked
        ),
        text,
        out,
        machine,
        selection=Selection("held_out_kl", options.select == "best", options.patience),
        marked=True,
        source=_answers(config, text, frozenset(stop), machine),
    )


def _answers(config: Config, text: Packed, stop: frozenset[int], machine: Machine) -> Source:
    """Return the batches of answers that the current student writes.

    Prompt and draws of an answer depend on the seed and on its place in the order of the text alone: a resumed training
    repeats them, and they are the same on any number of ranks.
    """
    options, ranks, seed, begun = config.onpolicy, machine.ranks, config.seed, _skipped(config)
    steps, batch, micro = steps_of(config), options.global_batch_size, options.micro_batch_size
    count = accumulation("onpolicy", options, ranks.world)
    prompts = Prompts(options.prompt_tokens, text.index["after"], text.index["first"])
    length = partial(answer_length, steps=steps, shortest=options.min_new_tokens, longest=options.max_new_tokens)

    def batches(engine: Engine, rest: Rows, step: int) -> Iterator[Tensor]:
        first = begun + step * batch
        rows = chain.from_iterable(stream(rest, micro, ranks.rank, ranks.world, first, seed))

        def goes_on(writes: bool) -> bool:
            return engine.average({"writes": torch.tensor(float(writes))})["writes"] > 0.0

        number = 0  # of the micro-batch
        while True:
            places = [first + ranks.rank + ranks.world * (number * micro + row) for row in range(micro)]
            read = [prompts.of(next(rows).numpy(), np.random.default_rng([seed, each])) for each in places]
            generators = [torch.Generator(machine.device.torch).manual_seed((seed << 32) + each) for each in places]
            how = Drawing(length(step + number // count), options.temperature, stop)
            yield answered(engine.predict, [torch.from_numpy(each) for each in read], generators, how, goes_on)
            number += 1

    return Source(steps, lambda taken: batch * sum(map(length, range(taken))), batches, marked=True)


def _ends(folder: Path) -> set[int]:
    """Return the ids that end a text of the model of a folder, as its generation_config.json or config.json says."""
    fields = generation_of(folder) or read_config(folder)
    ids = fields.get("eos_token_id")
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _skipped(config: Config) -> int:
    """Return the number of sequences that teacher correction and recovery read: prompts come from those behind them."""
    read = {"teacher_correction": config.corrects, "distill": "distill" in config.recipe.stages}
    return sum(sequences_of(section, config) for section, reads in read.items() if reads)


STAGE = Stage(
    name="onpolicy",
    makes="onpolicy_student",
    run=run,
    settings=settings,
    needs=("teacher", "initial_student", "tokens"),
    needs_also=needs_also,
    becomes=("recovered",),
    enabled=enabled,
    choices={"onpolicy.divergence": DIVERGENCES},
    check=check,
    check_text=partial(check_text, "onpolicy"),
    resumable=True,
)
