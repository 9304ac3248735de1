"""adopt: a student that was cut elsewhere, to be recovered, exported and measured like one that was cut here."""

import shutil
from pathlib import Path

from pipeline.config import Config
from pipeline.runtime import model_source
from pipeline.runtime.checkpoint import TOKENIZER, carry_tokenizer, open_checkpoint
from pipeline.runtime.machine import Machine
from pipeline.stages.stage import Inputs, Stage

FIELD = "model.start"


def enabled(config: Config) -> bool:
    """Whether the student was cut elsewhere."""
    return config.model.start is not None


def check(config: Config) -> None:
    """Refuse a line that adopts a student and is given none, or one not there or damaged."""
    if config.model.start is None:
        raise ValueError(f"{FIELD} is not set; give the model folder that recipe {config.recipe.name} shall recover")
    folder = _located(config).folder
    if folder is not None:
        model_source.inspect(folder, FIELD, config.model.allow_pickle)


def settings(config: Config) -> dict:
    """Give what determines the start: the digest of its files, and whether its code comes along."""
    trusted = {"trust_remote_code": True} if config.model.trust_remote_code else {}
    return trusted | {"files": _located(config).digest(), "allow_pickle": config.model.allow_pickle}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Fill `out` with the model folder, the teacher's tokenizer in it where it brings none.

    ValueError if it has no family table, or another vocabulary than the teacher.
    """
    shutil.rmtree(out, ignore_errors=True)
    given = _located(config)
    if given.folder is not None and not any(path for pattern in TOKENIZER for path in given.folder.glob(pattern)):
        out.mkdir(parents=True)
        carry_tokenizer(inputs["teacher"], out)
        machine.say(f"adopt: {config.model.start} brings no tokenizer; it gets the teacher's")
    model_source.adopt(given, out, config.model.trust_remote_code)
    teacher, student = (open_checkpoint(path, config.model.allow_pickle).anatomy for path in (inputs["teacher"], out))
    if teacher.sizes.vocabulary != student.sizes.vocabulary:
        raise ValueError(
            f"{FIELD}: {config.model.start} has a vocabulary of {student.sizes.vocabulary}, the teacher one of "
            f"{teacher.sizes.vocabulary}; recovery compares their distributions and needs one vocabulary"
        )
    total, inner = student.parameters()
    machine.say(f"adopt: {total / 1e6:.1f}M parameters, {inner / 1e6:.1f}M without embeddings")


def _located(config: Config) -> model_source.Origin:
    return model_source.locate(config.model.start, FIELD, config.model.allow_pickle)


STAGE = Stage(
    name="external_student",
    makes="initial_student",
    run=run,
    settings=settings,
    needs=("teacher",),
    enabled=enabled,
    check=check,
    all_ranks=False,
    revision=2,  # 2: with the teacher's tokenizer where there is none
    shows={"initial_student": ""},
)
