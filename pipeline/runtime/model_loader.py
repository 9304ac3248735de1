"""Models and tokenizers are loaded from a model folder, or from tensors in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from pipeline.model.families import FAMILIES, family_of
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.class_parameters import ClassParameters
from pipeline.runtime.described import read_config
from pipeline.runtime.model_class import reason, stock_config
from pipeline.runtime.modelling import pruned_class
from pipeline.runtime.tokenizer_check import PROBE, check_vocabulary
from pipeline.runtime.tokenizer_files import check_files

PANIC = "pyo3_runtime"  # module of the exceptions for faults inside the Rust library, which are no Exception
logging.disable_progress_bar()  # the pipeline shows its own


def load_model(folder: Path, dtype: torch.dtype | Literal["auto"], attention: str) -> PreTrainedModel:
    """Load a model folder on the CPU, in evaluation mode; a pruned one by this project's own modelling code.

    `attention` is an implementation of transformers, or auto for the one its class prefers. Of an image-text model the
    text half is loaded. The class is always one of
    the table of families. Raise ValueError if a weight would be missing, unexpected or newly initialised.
    """
    folder = Path(folder)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    if checkpoint.wrapped:
        kind = getattr(torch, config["dtype"] or "float32") if dtype == "auto" else dtype
        return model_of(config, checkpoint, kind, None if attention == "auto" else attention)
    family = family_of(config.get("model_type", "none"))
    loader = pruned_class(family.architecture) if "pruned" in config else AutoModelForCausalLM
    options = {} if attention == "auto" else {"attn_implementation": attention}
    return load_whole(loader, folder, config=stock_config(config, folder), dtype=dtype, **options).eval()


def load_whole(loader: Any, folder: Path, **options: Any) -> PreTrainedModel:
    """Load by transformers and return the model; ValueError unless every weight of the class came from the files."""
    try:
        model, info = loader.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    except (OSError, RuntimeError, KeyError, TypeError) as fault:
        raise ValueError(f"{folder} cannot be loaded by transformers ({reason(fault)})") from fault
    faults = {
        kind: sorted(map(str, info[kind]))[:3]
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(kind)
    }
    if faults:
        raise ValueError(f"{folder} does not fit {type(model).__name__}: {faults}")
    return model


def model_of(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """Return a model in memory from a config.json and the tensors of a checkpoint, in evaluation mode, on the CPU.

    Raise ValueError where the tensors are not those that the class needs.
    """
    name = family_of(config["model_type"]).architecture
    loader = pruned_class(name) if "pruned" in config else getattr(transformers, name)
    model = loader._from_config(loader.config_class(**config), dtype=dtype, attn_implementation=attention)
    parameters = ClassParameters(model, weights)
    used = {each for name in parameters for each in parameters.stored(name)}
    missing, _ = model.load_state_dict(dict(parameters), strict=False)
    unexpected = weights.keys() - used
    tied = set(model.all_tied_weights_keys) if config.get("tie_word_embeddings") else set()
    if set(missing) - tied or unexpected:
        strange = f"missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}"
        raise ValueError(f"weights: do not fit {name}: {strange}; give all that its checkpoint holds")
    return model.eval()


def load_tokenizer(folder: Path, trust_remote_code: bool = False):
    """Load the tokenizer of a model folder; ValueError for none, a damaged or empty one, or untrusted code.

    The configuration code of a folder of a known family is not run, even if its code is trusted.
    """
    folder = Path(folder)
    config = read_config(folder) if (folder / "config.json").exists() else {}
    known = config.get("model_type") in FAMILIES
    options = {"config": stock_config(config, folder)} if known else {}
    check_files(folder, config.get("vocab_size"))
    try:
        tokenizer = _probed(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as fault:  # a damaged file raises whatever its reader, in Python or Rust, meets first
        if "trust_remote_code" in str(fault):
            raise ValueError(
                f"model.trust_remote_code is false, and the tokenizer in {folder} is code of its own; read it, and set "
                "model.trust_remote_code=true to run it"
            ) from None
        raise ValueError(
            f"the tokenizer in {folder} is missing or damaged ({reason(fault)}); put its files (tokenizer.json or "
            "tokenizer.model, tokenizer_config.json) there again"
        ) from fault
    check_vocabulary(tokenizer, folder)
    return tokenizer


def _probed(folder: Path, **options: Any) -> Any:
    """Return the tokenizer of a folder once it has encoded a text, which reads fields that loading does not."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
        tokenizer(PROBE)
    except BaseException as fault:
        if type(fault).__module__ != PANIC:
            raise
        raise RuntimeError(f"{type(fault).__name__}: {fault}") from fault
    return tokenizer
