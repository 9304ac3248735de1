"""What the JSON files of a model folder say, checked before anything acts on it.

The words in these files are not ours: a class is looked up in the table of families, never by such a word, and a shard
is a file of the folder itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.model.families import FAMILIES

PANGU = "PanguEmbedded"  # openPangu-Embedded 1B and 7B: a Llama with biases under a name of its own
COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def read_config(folder: Path) -> dict[str, Any]:
    """Give the config.json of a model or training checkpoint, openPangu-Embedded as the Llama that it is.

    ValueError, naming the file and what to do, for one that is none or damaged, names what no class can be called, or
    is of quantised weights.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a model folder, a .gguf file or a hub id")
    config = read_mapping(path)
    _check_names(config, path)
    if config.get("model_type") == PANGU:
        kept = {key: value for key, value in config.items() if key not in ("auto_map", "bias")}
        biased = bool(config.get("bias", config.get("attention_bias", False)))
        config = kept | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": biased}
    if config.get("model_type") not in FAMILIES:  # refused where its anatomy is asked for
        return config
    for field in COUNTS:
        if not isinstance(config.get(field), int) or config[field] < 1:
            raise ValueError(f"{path}: {field} is {config.get(field)}, not a positive integer; fetch it again")
    if "architectures" not in config:
        raise ValueError(f"{path} has no architectures; name the model's class there, or fetch it again")
    if config.get("quantization_config"):
        raise ValueError(f"{path} has a quantization_config; give the model's unquantised weights, or its GGUF")
    return config


def _check_names(config: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where `model_type`, `architectures` or the base in `pruned` is no name of a class or a kind."""
    kind, named = config.get("model_type", ""), config.get("architectures", ["None"])
    if not isinstance(kind, str):
        raise ValueError(f"{path}: model_type is {json.dumps(kind):.60}, not a word; fetch it again")
    classes = named if isinstance(named, list) else []
    if not classes or not all(isinstance(name, str) and name.isascii() and name.isidentifier() for name in classes):
        raise ValueError(
            f"{path}: architectures is {json.dumps(named):.60}, not a list of class names; name the model's class "
            "there, or fetch it again"
        )
    pruned = config.get("pruned", {})
    if not isinstance(pruned, dict):
        raise ValueError(f"{path}: pruned is {json.dumps(pruned):.60}, not a JSON object; fetch it again")
    if kind in FAMILIES and pruned.get("base", FAMILIES[kind].architecture) != FAMILIES[kind].architecture:
        raise ValueError(
            f"{path}: pruned.base is {json.dumps(pruned['base']):.60}, and the class of {kind} is "
            f"{FAMILIES[kind].architecture}; export the student again, or fetch it again"
        )


def check_indices(folder: Path) -> None:
    """Raise ValueError where an index, ours or one that transformers would read, names a shard outside the folder.

    A shard is named by a plain file name. The file may be a link, as in the snapshots of a hub cache.
    """
    for path in sorted(folder.glob("*.index.json")):
        listed = read_mapping(path).get("weight_map", {})
        for file in listed.values() if isinstance(listed, dict) else ():
            if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
                raise ValueError(
                    f"{path}: weight_map names {json.dumps(file):.60}, not a file of the folder itself; put the shards "
                    "beside the index, or fetch it again"
                )


def read_mapping(path: Path) -> dict[str, Any]:
    """Give what a JSON file maps; ValueError, naming it, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise ValueError(f"{path} is no JSON ({fault}); fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {json.dumps(found):.40}, not a JSON object of fields; fetch it again")
    return found
