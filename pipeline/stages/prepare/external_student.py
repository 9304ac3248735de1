"""external_student: a student that was cut elsewhere, to be recovered, exported and measured like one cut here."""

import shutil
from pathlib import Path

from pipeline.config import Config
from pipeline.runtime import model_source
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import TOKENIZER, carry_tokenizer
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_tokenizer
from pipeline.runtime.tokenizer_check import check_fits, difference
from pipeline.stages.stage import Inputs, Stage

FIELD = "model.start"


def enabled(config: Config) -> bool:
    """Return whether the student was cut elsewhere."""
    return config.model.start is not None


def check(config: Config) -> None:
    """Refuse a recipe without the student it needs, and one that is missing, damaged or unlike the teacher."""
    if config.model.start is None:
        raise ValueError(f"{FIELD} is not set; give the model folder that recipe {config.recipe.name} is to recover")
    checkpoint = model_source.inspect(_located(config), FIELD)
    teacher = model_source.model_folder(config.model.path, config.model.allow_pickle)
    if checkpoint is not None and teacher is not None:
        _check_alike(config, teacher, checkpoint.folder)


def settings(config: Config) -> dict:
    """Return what determines the student: the digest of its files, and whether its tokenizer's code is copied."""
    trusted = {"trust_remote_code": True} if config.model.trust_remote_code else {}
    return trusted | {"files": _located(config).digest()}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Copy the model into `out`, with the teacher's tokenizer if it has none.

    Raise ValueError if it is damaged, has no family table, or does not have the teacher's vocabulary and token ids.
    """
    shutil.rmtree(out, ignore_errors=True)
    trusted, shard_bytes = config.model.trust_remote_code, config.checkpoint.shard_bytes
    student = model_source.import_model(_located(config), out, FIELD, shard_bytes, trusted)
    if not _has_tokenizer(out):
        generation = model_source.generation_of(out)
        carry_tokenizer(inputs["teacher"], out, generation is None)
        machine.say(f"external_student: {config.model.start} has no tokenizer; the teacher's is used")
    _check_alike(config, inputs["teacher"], out)
    for note in student.notes:
        machine.say(f"external_student: {note}")
    total, inner = student.anatomy.parameters()
    machine.say(f"external_student: {total / 1e6:.1f}M parameters, {inner / 1e6:.1f}M without embeddings")


def _check_alike(config: Config, teacher: Path, student: Path) -> None:
    """Raise ValueError where the student's tokens are not the teacher's.

    Their numbers of rows may differ by rows without a token (padding): recovery compares as many as both have.
    """
    sizes = [open_checkpoint(folder, config.model.allow_pickle).config["vocab_size"] for folder in (teacher, student)]
    rows, trusted = min(sizes), config.model.trust_remote_code
    if sizes[0] != sizes[1]:
        try:
            check_fits(load_tokenizer(teacher, trusted), rows)
        except ValueError as fault:
            raise ValueError(
                f"{FIELD}: {config.model.start} has a vocabulary of {sizes[1]}, the teacher one of {sizes[0]}, and not "
                f"by padding alone ({fault}); recovery compares their distributions and needs one vocabulary"
            ) from None
    if not _has_tokenizer(student):
        return
    try:
        ours, theirs = (load_tokenizer(folder, trusted) for folder in (student, teacher))
        check_fits(ours, rows)
    except ValueError as fault:
        raise ValueError(f"{FIELD}: {fault}") from fault
    unlike = difference(ours, theirs, rows)
    if unlike:
        raise ValueError(
            f"{FIELD}: the tokenizer of {config.model.start} gives other ids than the teacher's ({unlike}); remove its "
            "tokenizer files if it was trained with the teacher's, or give another student"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any(True for pattern in TOKENIZER for _ in folder.glob(pattern))


def _located(config: Config) -> model_source.ModelSource:
    return model_source.locate(str(config.model.start), FIELD, config.model.allow_pickle)


STAGE = Stage(
    name="external_student",
    makes="initial_student",
    run=run,
    settings=settings,
    needs=("teacher",),
    enabled=enabled,
    check=check,
    all_ranks=False,
    revision=3,  # 2: with the teacher's tokenizer where there is none; 3: a checked copy, no longer links
    shows={"initial_student": ""},
)
