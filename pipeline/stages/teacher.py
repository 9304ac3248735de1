"""teacher: the model to be made smaller, as a Hugging Face folder whatever form it came in."""

import shutil
from pathlib import Path

from pipeline.config import Config
from pipeline.runtime import origin
from pipeline.runtime.checkpoint import load_tokenizer, open_checkpoint

MAKES = "teacher"
NEEDS = ()
EVERY_RANK = False


def check(config: Config) -> None:
    """Refuse a model that is not there, before any work."""
    _located(config)


def settings(config: Config) -> dict:
    """Give what determines the teacher: the digest of its files."""
    return {"files": _located(config).digest(), "allow_pickle": config.model.allow_pickle}


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Fill `out` with the model folder; ValueError if its family has no table or its weights do not match it."""
    shutil.rmtree(out, ignore_errors=True)
    origin.adopt(_located(config), out)
    checkpoint = open_checkpoint(out, config.model.allow_pickle)
    if "auto_map" in checkpoint.config and not config.model.trust_remote_code and "pruned" not in checkpoint.config:
        raise ValueError(
            f"model.path: {config.model.path} brings modelling code of its own; read it, and set "
            "model.trust_remote_code=true to run it"
        )
    total, inner = checkpoint.anatomy.parameters()
    vocabulary = len(load_tokenizer(out, config.model.trust_remote_code))
    if vocabulary > checkpoint.config["vocab_size"]:
        raise ValueError(
            f"model.path: the tokenizer has {vocabulary} tokens and the model {checkpoint.config['vocab_size']}; "
            "they do not belong together"
        )
    kind = checkpoint.config["architectures"][0]
    machine.say(f"teacher: {kind}, {total / 1e6:.1f}M parameters, {inner / 1e6:.1f}M without embeddings")


def _located(config: Config) -> origin.Origin:
    return origin.locate(config.model.path, allow_pickle=config.model.allow_pickle)
