"""teacher: the model to be made smaller, as a Hugging Face folder, from any supported format."""

import shutil
from pathlib import Path

from pipeline.config import Config
from pipeline.runtime import model_source
from pipeline.runtime.checkpoint import Checkpoint
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_tokenizer
from pipeline.runtime.tokenizer_check import check_fits
from pipeline.stages.stage import Inputs, Stage

FIELD = "model.path"


def check(config: Config) -> None:
    """Refuse a model that does not exist, and a folder that is not a whole model of a known family."""
    source = _located(config)
    checkpoint = model_source.inspect(source, FIELD)
    if checkpoint is not None:
        _check_tokenizer(checkpoint, config)


def settings(config: Config) -> dict:
    """Return what determines the teacher: the digest of its files, and whether its tokenizer's code is copied."""
    trusted = {"trust_remote_code": True} if config.model.trust_remote_code else {}
    return trusted | {"files": _located(config).digest()}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Copy the model into `out`, every weight read and checked; ValueError if anything in it does not match."""
    shutil.rmtree(out, ignore_errors=True)
    trusted, shard_bytes = config.model.trust_remote_code, config.checkpoint.shard_bytes
    checkpoint = model_source.import_model(_located(config), out, FIELD, shard_bytes, trusted)
    _check_tokenizer(checkpoint, config)
    for note in checkpoint.notes:
        machine.say(f"teacher: {note}")
    total, inner = checkpoint.anatomy.parameters()
    kind = checkpoint.config["architectures"][0]
    machine.say(f"teacher: {kind}, {total / 1e6:.1f}M parameters, {inner / 1e6:.1f}M without embeddings")


def _check_tokenizer(checkpoint: Checkpoint, config: Config) -> None:
    """Raise ValueError where the folder has no tokenizer, or one of another vocabulary than the model's."""
    try:
        tokenizer = load_tokenizer(checkpoint.folder, config.model.trust_remote_code)
        check_fits(tokenizer, checkpoint.config["vocab_size"])
    except ValueError as fault:
        raise ValueError(f"{FIELD}: {fault}") from fault


def _located(config: Config) -> model_source.ModelSource:
    return model_source.locate(config.model.path, FIELD, config.model.allow_pickle)


STAGE = Stage(
    name="teacher",
    makes="reference",
    run=run,
    settings=settings,
    becomes=("teacher", "subject"),
    check=check,
    all_ranks=False,
    revision=2,  # 2: a checked copy, no longer links
    shows={"teacher": ""},
)
