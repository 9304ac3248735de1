"""correct: before it teaches, the teacher learns the next tokens of the text that the student will recover from.

Teacher correction (LLM Pruning and Distillation in Practice: The Minitron Approach, arXiv 2408.11796): a teacher far
from the text, such as one tuned for chats, guides worse than one that was brought near it. Stages after this one read
the corrected teacher; those that compare with the dense model do not.
"""

import shutil
from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.distill.language import LanguageModel
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.ranks import place
from pipeline.training import accumulation, settings_of, steps_of, train_model

MAKES = "teacher"
NEEDS = ("teacher", "tokens")
EVERY_RANK = True
RESUMES = True  # goes on from the checkpoints an interrupted attempt left


def needed(config: Config) -> bool:
    """Whether the teacher is corrected."""
    return config.correct.tokens > 0


def check(config: Config) -> None:
    """Refuse batches that cannot be divided, runs shorter than a step and another hold-out than that of recovery."""
    if not needed(config):
        return
    accumulation("correct", config.correct, place()[1])
    steps_of("correct", config.correct, config.data.sequence)
    held, other = config.correct.validate_tokens, config.distill.validate_tokens
    if held != other and "distill" in config.recipe.line:
        raise ValueError(
            f"correct.validate_tokens is {held} and distill.validate_tokens {other}; recovery reads on where the "
            "correction ended, so both hold out the same text: set them alike"
        )


def settings(config: Config) -> dict:
    """Give what determines the corrected weights; how the work is spread over ranks and memory does not."""
    return settings_of(config, config.correct, {"chunk"})


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write the corrected teacher as a model folder in float32, and metrics.jsonl."""
    asked = config.correct
    train_model(
        "correct",
        config,
        open_checkpoint(inputs["teacher"], config.model.allow_pickle),
        lambda load: LanguageModel(load(inputs["teacher"]), asked.chunk, asked.gradient_checkpointing),
        Packed(inputs["tokens"] / "recovery"),
        out,
        machine,
    )
    if machine.ranks.rank == 0:
        for code in inputs["teacher"].glob("*.py"):  # of the model, where it brings its own
            shutil.copy(code, out)
