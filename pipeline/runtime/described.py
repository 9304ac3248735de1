"""The JSON files of a model folder, read within bounds and checked before anything acts on them.

Their contents are not trusted: a class is looked up in the table of families, never by a name in a file; every count
has an upper limit.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.model.families import FAMILIES, WRAPPERS, Family
from pipeline.model.families.table import FIELDS
from pipeline.model.layer_types import PER_LAYER_LISTS
from pipeline.runtime.config_bounds import check_length, check_numbers, check_repeats
from pipeline.runtime.model_class import config_fields, reserved_names
from pipeline.runtime.wrapper import text_config, whole_config

PANGU = "PanguEmbedded"  # openPangu-Embedded 1B and 7B: a Llama with biases under a name of its own
OWN_TYPE = "pruned_"  # before the model_type of a network that the stock class of that type would compute wrongly
MIB = 1 << 20
SIZES = {"config.json": 4 * MIB, "tokenizer.json": 256 * MIB}  # largest files that are read; of other JSON:
SIZE = 32 * MIB
PARTS = 1 << 19  # the most objects, arrays and entries in a JSON file that is read
DEPTH = 100  # the most objects and arrays inside each other
LIMITS = {  # the largest value of each count that is believed before the weights confirm it
    "vocabulary": 1 << 24,
    "hidden": 1 << 18,
    "layers": 1 << 12,
    "heads": 1 << 14,
    "neurons": 1 << 22,
}
OPTIONAL = {"groups": 1 << 14, "head_size": 1 << 14}
WIDTHS = {"heads": 1 << 14, "groups": 1 << 14, "neurons": 1 << 22}  # of a layer of its own widths
# Fields that would choose code, files or kernels when transformers reads them. `dtype` replaces `torch_dtype`.
DROPPED = ("auto_map", "attn_implementation", "experts_implementation", "transformers_weights", "torch_dtype")
# Fields of other tasks than the next token, and of the form of a model's output.
UNUSED = ("id2label", "label2id", "num_labels", "problem_type", "output_attentions", "output_hidden_states",
          "return_dict", "use_return_dict")  # fmt: skip
SPECIAL = "__float__"  # the key under which transformers writes an infinity
POINTER = b"version https://git-lfs.github.com/spec"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model or training checkpoint; of an image-text model, that of its text half.

    openPangu-Embedded is returned as the Llama it is.

    Fields that would choose code or files (`auto_map` among them) are left out: the model is always of a class of the
    table of families. Raise ValueError, naming the file and what to do, for one that is missing, damaged, out of
    bounds, names what cannot be a class, or describes quantised weights.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        check_file(path)
        raise ValueError(f"{folder} has no config.json; give a model folder, a .gguf file or a hub id")
    stored = read_mapping(path)
    return checked_config(_floats_read(stored), path)


def checked_config(stored: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the fields of a config.json, read from `path`, that this project acts on; see `read_config`."""
    _check_names(stored, path)
    if stored.get("model_type") in WRAPPERS:
        return checked_config(text_config(wrapper_config(stored, path)), path)
    config = _believed(stored)
    kind = config.get("model_type")
    if kind == PANGU:
        biased = bool(config.pop("bias", config.get("attention_bias", False)))
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": biased}
    elif isinstance(kind, str) and kind.startswith(OWN_TYPE) and config.get("pruned"):
        config["model_type"] = kind.removeprefix(OWN_TYPE)
    if config.get("model_type") not in FAMILIES:  # refused where its anatomy is built
        return config
    family = FAMILIES[config["model_type"]]
    config = _bounded(config, config["model_type"], path, family)
    if config.get("architectures") is None:
        config["architectures"] = [family.architecture]
    if config.get(str(family.field("layers"))) is None and family.layer_list is not None:
        config[str(family.field("layers"))] = family.width(config, "layers")
    for width, limit in (LIMITS | OPTIONAL).items():
        field = family.field(width)
        optional = width in OPTIONAL or (width == "neurons" and bool(family.neurons_per_channel or family.adjusted))
        if field is not None and not (optional and config.get(field) is None):
            _check_count(field, config.get(field), limit, path)
    _check_layers(config, path)
    if config.get("quantization_config"):
        raise ValueError(f"{path} has a quantization_config; give the model's unquantised weights, or its GGUF")
    return config


def wrapper_config(stored: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the config.json of an image-text model, read from `path`, completed by its class.

    ValueError, naming the file, for counts out of bounds and for what transformers refuses.
    """
    text = stored.get("text_config", {})
    fields = {**stored, **text} if isinstance(text, dict) else {}  # an old file has the text half's fields outside
    for width, limit in (LIMITS | OPTIONAL).items():
        if fields.get(str(FIELDS[width])) is not None:
            _check_count(str(FIELDS[width]), fields[str(FIELDS[width])], limit, path)
    believed = _bounded(_believed(stored), stored["model_type"], path)
    try:
        return whole_config(believed)
    except Exception as fault:  # transformers' validation raises whatever a field's value leads to
        raise ValueError(
            f"{path} is refused by transformers ({type(fault).__name__}: {' '.join(str(fault).split()):.160}); correct "
            "that field, or fetch it again"
        ) from fault


def _believed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json and its sections without those that choose code or files, or are not used."""
    left_out = {*DROPPED, *UNUSED, *reserved_names()}
    kept = {
        name: _believed(value) if isinstance(value, dict) else value
        for name, value in stored.items()
        if name not in left_out and not name.startswith("_")
    }
    if stored.get("dtype") is None and isinstance(stored.get("torch_dtype"), str):
        kept["dtype"] = stored["torch_dtype"]
    return kept


def _bounded(config: dict[str, Any], kind: str, path: Path, family: Family | None = None) -> dict[str, Any]:
    """Return the fields of a config without those that hide a method of its class; ValueError for numbers out of
    bounds."""
    names = config_fields(kind)
    lengths = {} if family is None else family.lengths
    stored = {name for terms in lengths.values() for name in terms}
    known = {name: value for name, value in config.items() if name in names}
    check_numbers(known, path, names, "rope_parameters" in names, stored)
    if family is not None:
        check_repeats(known, family, path)
    return {name: value for name, value in config.items() if name not in reserved_names(kind)}


def stored_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written as config.json for a config of this project.

    Static scales have the tensor names of the post-norms they replace, so the stock class would load them without an
    error and compute another network. Such a model gets a model_type that transformers does not know; `read_config`
    takes the prefix off again.
    """
    written: dict[str, Any] = _floats_written(config)
    if not config.get("pruned", {}).get("scales"):
        return written
    return written | {"model_type": OWN_TYPE + config["model_type"], "architectures": ["PrunedForCausalLM"]}


def _floats_read(value: Any) -> Any:
    """Return a value of a config.json with the numbers that JSON has no form for, as transformers writes them."""
    if isinstance(value, dict):
        special = value.get(SPECIAL) if value.keys() == {SPECIAL} else None
        if special in ("Infinity", "-Infinity", "NaN"):
            return float(special)
        return {name: _floats_read(each) for name, each in value.items()}
    return [_floats_read(each) for each in value] if isinstance(value, list) else value


def _floats_written(value: Any) -> Any:
    """Return a value as config.json holds it, infinities in the form that transformers reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return {SPECIAL: {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")}
    if isinstance(value, Mapping):
        return {name: _floats_written(each) for name, each in value.items()}
    return [_floats_written(each) for each in value] if isinstance(value, list | tuple) else value


def _check_count(field: str, value: Any, limit: int, path: Path, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
        text = json.dumps(value)
        raise ValueError(f"{path}: {field} is {text:.60}, not an integer from {least} to {limit}; fetch it again")


def _check_layers(config: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where a list with an entry for each layer has another length, or an entry is malformed."""
    field = FAMILIES[config["model_type"]].field("layers")
    count, tied = config[str(field)], config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings is {json.dumps(tied):.60}, not true or false; fetch it again")
    pruned = config.get("pruned", {})
    lists = {name: config.get(name) for name in PER_LAYER_LISTS} | {"pruned.layers": pruned.get("layers")}
    for name, entries in lists.items():
        if entries is None:
            continue
        if not isinstance(entries, list):
            raise ValueError(f"{path}: {name} is {json.dumps(entries):.60}, not a list; fetch it again")
        if entries or name not in PER_LAYER_LISTS:  # the class may fill an empty one: `Checkpoint` checks its length
            check_length(name, entries, str(field), count, path)
    attention = pruned.get("attention", {})
    if not isinstance(attention, dict) or not all(isinstance(entry, dict) for entry in attention.values()):
        raise ValueError(f"{path}: pruned.attention is not an object of objects; export the student again")
    if not all(isinstance(entry, str) for entry in config.get("layer_types") or ()):
        raise ValueError(f"{path}: layer_types holds entries that are not strings; fetch it again")
    for place, entry in enumerate(pruned.get("layers") or ()):
        if not isinstance(entry, dict) or entry.keys() != WIDTHS.keys():
            raise ValueError(f"{path}: pruned.layers[{place}] does not have {', '.join(WIDTHS)}; fetch it again")
        for field, limit in WIDTHS.items():
            _check_count(f"pruned.layers[{place}].{field}", entry[field], limit, path, least=0)
        if entry["heads"] % entry["groups"] if entry["groups"] else entry["heads"]:
            raise ValueError(f"{path}: pruned.layers[{place}].heads is not a multiple of its groups; fetch it again")
    if pruned.get("layers") and not all(any(entry[field] for entry in pruned["layers"]) for field in WIDTHS):
        raise ValueError(f"{path}: pruned.layers leaves no layer with attention, or none with an FFN; fetch it again")


def _check_names(config: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where `model_type`, `architectures` or `pruned.base` cannot name a class or a type."""
    kind, named = config.get("model_type", ""), config.get("architectures")
    if not isinstance(kind, str):
        raise ValueError(f"{path}: model_type is {json.dumps(kind):.60}, not a string; fetch it again")
    classes = ["None"] if named is None else named if isinstance(named, list) else []
    if not classes or not all(isinstance(name, str) and name.isascii() and name.isidentifier() for name in classes):
        raise ValueError(
            f"{path}: architectures is {json.dumps(named):.60}, not a list of class names; name the model's class "
            "there, or fetch it again"
        )
    pruned = config.get("pruned", {})
    if not isinstance(pruned, dict):
        raise ValueError(f"{path}: pruned is {json.dumps(pruned):.60}, not a JSON object; fetch it again")
    family = FAMILIES.get(kind.removeprefix(OWN_TYPE))
    if family is not None and pruned.get("base", family.architecture) != family.architecture:
        raise ValueError(
            f"{path}: pruned.base is {json.dumps(pruned['base']):.60}, and the class of {kind} is "
            f"{family.architecture}; export the student again, or fetch it again"
        )


def read_mapping(path: Path, objects: int = PARTS, entries: int = PARTS) -> dict[str, Any]:
    """Return the object that a JSON file holds; ValueError, naming it, for anything else and for a file too large.

    `objects`: the most objects and arrays in it; `entries`: the most entries of them, counted by their commas.
    """
    check_file(path)
    data = path.read_bytes()
    if sum(data.count(sign) for sign in (b"[", b"{")) > objects or data.count(b",") > entries:
        raise ValueError(f"{path} has more than {objects} objects and arrays, or {entries} entries; fetch it again")
    deep = f"{path} is nested too deeply for a file of a model folder; fetch it again"
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError(deep) from None
    except ValueError as fault:
        raise ValueError(f"{path} is no JSON ({fault}); fetch it again") from None
    if _deeper(content, DEPTH):
        raise ValueError(deep)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {json.dumps(content):.40}, not a JSON object of fields; fetch it again")
    return content


def _deeper(content: Any, depth: int) -> bool:
    """Whether a value has more than `depth` objects and arrays inside each other."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(depth):
        entries = (entry for each in level for entry in (each.values() if isinstance(each, dict) else each))
        level = [entry for entry in entries if isinstance(entry, dict | list)]
    return bool(level)


def check_file(path: Path) -> None:
    """Raise ValueError where a file is a broken link, a pipe, device or socket, a git-lfs pointer instead of its
    content, or JSON too large."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {path.readlink()}, which does not exist; fetch the file again")
    if not path.is_file():
        if path.exists() and not path.is_dir():  # opening it may wait without an end
            raise ValueError(f"{path} is a pipe, device or socket, not a regular file; fetch it again")
        return
    limit = SIZES.get(path.name, SIZE)
    if path.suffix == ".json" and path.stat().st_size > limit:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {limit} that are read; fetch it again")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`, or fetch it again")
