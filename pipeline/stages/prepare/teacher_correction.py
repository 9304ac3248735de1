"""correct: before it teaches, the teacher learns the next tokens of the text that the student will recover from.

Teacher correction (LLM Pruning and Distillation in Practice: The Minitron Approach, arXiv 2408.11796): a teacher far
from the text, such as one tuned for chats, guides worse than one that was brought near it. Stages after this one read
the corrected teacher; those that compare with the dense model do not.
"""

import shutil
from functools import partial
from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.distill.next_token import LanguageModel
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import place
from pipeline.stages.stage import Inputs, Stage
from pipeline.training import train_model
from pipeline.training_settings import accumulation, check_text, settings_of, steps_of


def enabled(config: Config) -> bool:
    """Whether the teacher is corrected."""
    return config.teacher_correction.tokens > 0


def check(config: Config) -> None:
    """Refuse batches that cannot be divided, runs shorter than a step and another hold-out than that of recovery."""
    if not enabled(config):
        return
    accumulation("teacher_correction", config.teacher_correction, place()[1])
    steps_of("teacher_correction", config.teacher_correction, config.data.sequence_length)
    held, other = config.teacher_correction.eval_tokens, config.distill.eval_tokens
    if held != other and "distill" in config.recipe.stages:
        raise ValueError(
            f"teacher_correction.eval_tokens: {held}, and distill.eval_tokens is {other}; recovery continues in the "
            "text after the correction, so both hold out the same part: set them to one value"
        )


def settings(config: Config) -> dict:
    """Return what determines the corrected weights; how the work is spread over ranks and memory does not."""
    return settings_of(config, config.teacher_correction, set())


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the corrected teacher as a model folder in float32, and metrics.jsonl."""
    options = config.teacher_correction
    train_model(
        "teacher_correction",
        config,
        open_checkpoint(inputs["teacher"], config.model.allow_pickle),
        lambda load: LanguageModel(load(inputs["teacher"]), config.logits.chunk, options.gradient_checkpointing),
        Packed(inputs["tokens"] / "recovery"),
        out,
        machine,
        marked=True,
    )
    if machine.ranks.rank == 0:
        for code in inputs["teacher"].glob("*.py"):  # of the model, where it brings its own
            shutil.copy(code, out)


STAGE = Stage(
    name="teacher_correction",
    makes="corrected_teacher",
    run=run,
    settings=settings,
    needs=("teacher", "tokens"),
    becomes=("teacher", "subject"),
    enabled=enabled,
    check=check,
    check_text=partial(check_text, "teacher_correction"),
    resumable=True,  # resumes from the checkpoints an interrupted attempt left
    shows={"corrected_teacher": ""},
)
