"""What settings of a training mean: what determines its weights, its steps, and the text that it holds out."""

from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.neutral import TRAINING_NEUTRAL
from pipeline.config.training import Training
from pipeline.data.packing import Packed
from pipeline.distill.holdout import hold_out


def settings_of(config: Config, options: Training, without: set[str]) -> dict[str, Any]:
    """Return what determines the trained weights, but the fields `without`; the number of ranks is not part of it."""
    own = options.model_dump(exclude=set(TRAINING_NEUTRAL | without))
    return own | {"seed": config.seed, "deepspeed": config.deepspeed.extra}


def accumulation(section: str, options: Training, world: int) -> int:
    """Return the micro-batches per step and rank; ValueError where the batch is not a whole number of them."""
    batch, micro = options.global_batch_size, options.micro_batch_size
    together = micro * world
    if batch % together:
        below, above = batch // together * together, -(-batch // together) * together
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"{section}.global_batch_size: {batch} is no multiple of {section}.micro_batch_size ({micro}) x ranks "
            f"({world}) = {together}; nearest: {near}"
        )
    return batch // together


def check_text(section: str, config: Config, tokens: Path) -> None:
    """Raise ValueError where the recovery text is too short to hold out as much of it as a section of settings asks."""
    hold_out(Packed(tokens / "recovery"), held_out_rows(section, config), section)


def held_out_rows(section: str, config: Config) -> int:
    """Return how many sequences of the recovery text are held out."""
    return max(1, getattr(config, section).eval_tokens // config.data.sequence_length)


def steps_of(section: str, options: Training, sequence: int) -> int:
    """Return the number of optimizer steps; ValueError where the tokens are too few for one."""
    per_step = options.global_batch_size * sequence
    if options.tokens < per_step:
        raise ValueError(
            f"{section}.tokens: {options.tokens} is less than one step of {section}.global_batch_size "
            f"({options.global_batch_size}) x data.sequence_length ({sequence}) = {per_step} tokens; raise it or lower "
            "the batch"
        )
    steps = options.tokens // per_step
    return steps if options.max_steps is None else min(steps, options.max_steps)


def sequences_of(section: str, config: Config) -> int:
    """Return the number of sequences of the recovery text that a training on packed text reads."""
    options = getattr(config, section)
    return steps_of(section, options, config.data.sequence_length) * options.global_batch_size
