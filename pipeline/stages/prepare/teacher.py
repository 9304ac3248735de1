"""teacher: the model to be made smaller, as a Hugging Face folder whatever form it came in."""

import shutil
from pathlib import Path

from pipeline.config import Config
from pipeline.runtime import model_source
from pipeline.runtime.checkpoint import Checkpoint, load_tokenizer
from pipeline.runtime.machine import Machine
from pipeline.stages.stage import Inputs, Stage

FIELD = "model.path"


def check(config: Config) -> None:
    """Refuse a model that is not there, and a folder that is no whole model of a known family, before any work."""
    folder = _located(config).folder
    if folder is not None:
        _inspected(folder, config)


def settings(config: Config) -> dict:
    """Give what determines the teacher: the digest of its files, and whether its code comes along."""
    trusted = {"trust_remote_code": True} if config.model.trust_remote_code else {}
    return trusted | {"files": _located(config).digest(), "allow_pickle": config.model.allow_pickle}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Fill `out` with the model folder; ValueError if its family has no table or its weights do not match it."""
    shutil.rmtree(out, ignore_errors=True)
    model_source.adopt(_located(config), out, config.model.trust_remote_code)
    checkpoint = _inspected(out, config)
    total, inner = checkpoint.anatomy.parameters()
    kind = checkpoint.config["architectures"][0]
    machine.say(f"teacher: {kind}, {total / 1e6:.1f}M parameters, {inner / 1e6:.1f}M without embeddings")


def _inspected(folder: Path, config: Config) -> Checkpoint:
    """Open a model folder whose weights, config and tokenizer belong together; ValueError where they do not."""
    checkpoint = model_source.inspect(folder, FIELD, config.model.allow_pickle)
    if "auto_map" in checkpoint.config and not config.model.trust_remote_code and "pruned" not in checkpoint.config:
        raise ValueError(
            f"{FIELD}: {config.model.path} brings modelling code of its own; read it, and set "
            "model.trust_remote_code=true to run it"
        )
    try:
        vocabulary = len(load_tokenizer(folder, config.model.trust_remote_code))
    except ValueError as fault:
        raise ValueError(f"{FIELD}: {fault}") from fault
    if vocabulary > checkpoint.config["vocab_size"]:
        raise ValueError(
            f"{FIELD}: the tokenizer has {vocabulary} tokens and the model {checkpoint.config['vocab_size']}; "
            "they do not belong together"
        )
    return checkpoint


def _located(config: Config) -> model_source.Origin:
    return model_source.locate(config.model.path, FIELD, config.model.allow_pickle)


STAGE = Stage(
    name="teacher",
    makes="reference",
    run=run,
    settings=settings,
    becomes=("teacher", "subject"),
    check=check,
    all_ranks=False,
    shows={"teacher": ""},
)
