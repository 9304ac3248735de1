"""Hugging Face model folders: read lazily, written in shards, loaded as models."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from pipeline.model import decilm
from pipeline.model.anatomy import PER_LAYER_LISTS, Anatomy, anatomy_of
from pipeline.model.families import FAMILIES, WRAPPERS, Family, family_of
from pipeline.model.families.wrappers import text_names
from pipeline.model.hf_config import frozen_modules, per_layer
from pipeline.runtime import wrapper
from pipeline.runtime.class_parameters import ClassParameters
from pipeline.runtime.described import check_file, read_config, read_mapping, stored_config, wrapper_config
from pipeline.runtime.modelling import HEADS, pruned_class
from pipeline.runtime.tokenizer_check import PROBE
from pipeline.runtime.weight_files import FLOATING, INDEX, SINGLE, Tensors
from pipeline.runtime.weight_names import PREDICTION, canonical_names
from pipeline.runtime.wrapper import Around

TOKENIZER = ("tokeniz*", "vocab*", "merges.txt", "*.model")
GENERATION = "generation_config.json"
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
CARRIED = (*TOKENIZER, "special_tokens_map.json", "added_tokens.json", "chat_template*", *PROCESSOR, GENERATION)
FROM_CLASS = ("head_size", "groups", "neurons", "layers", "hidden", "heads")  # widths, where config.json is silent

logging.disable_progress_bar()  # the pipeline shows its own


class Checkpoint(Mapping[str, Tensor]):
    """A model folder as a lazy mapping from the tensor names of its family's table to tensors.

    `config` is its `config.json`, completed by what the class assumes where the file is silent. Scoring, cutting and
    `load_model` all read a folder through this class. `notes` says what is left out or read in another way than it is
    stored. A folder in the DeciLM form is read as what it is to our own modelling code: a stock class with widths per
    layer.
    """

    def __init__(self, folder: Path, allow_pickle: bool):
        self.folder = Path(folder)
        self.notes: list[str] = []
        self.config: dict[str, Any] = read_config(self.folder)
        self._tensors = Tensors(self.folder, allow_pickle)
        self._stored = {name: name for name in self._tensors}
        self.around: Around | None = None  # what an image-text model has around this text half of it
        self.wrapped = False  # whether the folder holds the whole of it
        if self.config.get("model_type") == decilm.MODEL_TYPE:
            self.config = self._plain_decilm()
        if self.config.get("model_type") in FAMILIES:
            family = family_of(self.config["model_type"])
            self._complete(family)
            self.around, text = self._surroundings(family)
            names, left_out = canonical_names(text, self.config)
            self._stored = {name: text[own] for name, own in names.items()}
            if left_out:
                count = f"{len(left_out)} tensors of multi-token prediction"
                self.notes.append(f"{count} are left out: {', '.join(left_out[:2])}{', ...' if left_out[2:] else ''}")
            self._tie()

    def _complete(self, family: Family) -> None:
        """Set the fields that config.json leaves to the class, and drop those that other fields replace."""
        whole = stock_config(self.config, self.folder)
        lengths = {name for terms in family.lengths.values() for term in terms for name in term.split("*")}
        own = (*family.experts, family.top_k, family.leading_dense, *family.layer_indices, *family.depth_scaled)
        own = (*own, *family.repeated)
        fields = (*(family.field(width) for width in FROM_CLASS), *sorted(lengths), *own)
        lists = [name for name in PER_LAYER_LISTS if name in vars(whole)]  # some classes compute them
        self.config |= {
            field: value
            for field in ("tie_word_embeddings", *lists, *filter(None, fields))
            if self.config.get(field) is None and (value := getattr(whole, field, None)) is not None
        }
        for field in family.superseded:
            self.config.pop(field, None)
        if family.adjusted and getattr(whole, family.adjusted[0], False):
            field, tensor = family.adjusted
            name = family.prefix.format(layer=0) + tensor
            if name in self._tensors:
                self.config |= {field: False, str(family.field("neurons")): self._tensors.shape(name)[0]}

    def _surroundings(self, family: Family) -> tuple[Around | None, dict[str, str]]:
        """Return what is around the text half, and the stored name by the name in the text half of each tensor."""
        inside, stored = self.folder / wrapper.FOLDER, read_mapping(self.folder / "config.json")
        if stored.get("model_type") in WRAPPERS:
            text = text_names(self._tensors, family)
            taken = set(text.values())
            beside = [name for name in self._tensors if name not in taken and not PREDICTION.search(name)]
            self.wrapped = True
            whole = wrapper_config(stored, self.folder / "config.json")
            return wrapper.around_of(whole, self._tensors, beside), text
        around = None
        if inside.is_dir():
            facts = read_mapping(inside / "config.json")
            around = Around(facts["config"], facts["prefix"], facts["head"], Tensors(inside, False))
        return around, {name: name for name in self._tensors}

    @property
    def anatomy(self) -> Anatomy:
        """Return the anatomy; ValueError for an unknown family or a checkpoint that does not match its table."""
        if "model_type" not in self.config:
            path = self.folder / "config.json"
            raise ValueError(f"{path} has no model_type; give a model folder of transformers, or fetch it again")
        anatomy = anatomy_of(self.config, self)
        whole_heads = anatomy.whole_heads or (self.around is not None and self.around.wrapper.whole_heads)
        return replace(anatomy, whole_heads=whole_heads)

    def check(self) -> None:
        """Compare the headers of all weights with the table and with the class that transformers builds.

        Raise ValueError where a tensor is missing, unknown, of another shape, or not stored as floating-point numbers,
        and where the class cannot be built from config.json.
        """
        anatomy = self.anatomy
        for name, shape in anatomy.shapes().items():
            stored, kind = self._tensors.shape(self._stored[name]), self._tensors.dtype(self._stored[name])
            if stored != shape:
                raise ValueError(
                    f"{self.folder}: {name} is {list(stored)}, and by config.json it would be {list(shape)}; they do "
                    "not belong together, fetch both again"
                )
            if kind not in FLOATING.values():
                raise ValueError(
                    f"{self.folder}: {name} is stored as {kind}, not as unquantised weights are "
                    f"({', '.join(FLOATING.values())}); give the unquantised model, or its GGUF"
                )
        self._check_class(anatomy)

    def _check_class(self, anatomy: Anatomy) -> None:
        """Compare the table with the class, built without memory for its weights."""
        path = self.folder / "config.json"
        _check_pruned(self.config, anatomy, path)
        needed = class_shapes(self.config, self.folder)
        shapes = anatomy.shapes()
        missing, unread = sorted(needed.keys() - shapes.keys()), sorted(shapes.keys() - needed.keys())
        differing = [name for name in needed.keys() & shapes.keys() if needed[name] != shapes[name]]
        if missing or unread or differing:
            raise ValueError(
                f"{path}: {anatomy.family.architecture} built from it does not have the weights' tensors: missing "
                f"{missing[:3] or 'nothing'}, not read {unread[:3] or 'nothing'}, of another shape "
                f"{sorted(differing)[:3] or 'nothing'}; config.json and weights do not belong together"
            )

    def _plain_decilm(self) -> dict[str, Any]:
        try:
            return decilm.plain(self.config, self._tensors)
        except (KeyError, TypeError, AttributeError, ArithmeticError) as fault:
            raise ValueError(
                f"{self.folder / 'config.json'} is not in the DeciLM form ({_reason(fault)}); export the model again"
            ) from None

    def _tie(self) -> None:
        """Decide whether the output matrix is the embedding, as transformers does.

        config.json says whether they are tied. A stored copy that is equal is left out; a stored matrix that differs is
        used although config.json says tied.
        """
        if not self.config.get("tie_word_embeddings"):
            return
        family = family_of(self.config["model_type"])
        head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
        if head in self._stored and embedding not in self._stored:
            self._stored[embedding] = self._stored.pop(head)
        elif head in self._stored and self._equal(head, embedding):
            del self._stored[head]
        elif head in self._stored:
            self.config["tie_word_embeddings"] = False
            self.notes.append(
                f"config.json ties the output matrix to the embedding, but another {head} is stored; it is used, as "
                "transformers does"
            )

    def _equal(self, one: str, other: str) -> bool:
        shapes = {self._tensors.shape(self._stored[name]) for name in (one, other)}
        return len(shapes) == 1 and torch.equal(self[one], self[other])

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._stored[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def bytes(self) -> int:
        """Return the size of the weight files on disk."""
        return self._tensors.bytes()


def open_checkpoint(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    """Open a model folder; ValueError names the file that is missing, truncated or refused."""
    return Checkpoint(folder, allow_pickle)


def open_tensors(folder: Path) -> Mapping[str, Tensor]:
    """Open a folder of *.safetensors as one lazy mapping; ValueError if a file is truncated or none is there."""
    return Tensors(Path(folder), False)


def _check_pruned(config: Mapping[str, Any], anatomy: Anatomy, path: Path) -> None:
    """Raise ValueError where a `pruned` section does not follow from the widths of its layers."""
    pruned = config.get("pruned", {})
    expected = per_layer(config, anatomy) if pruned.get("layers") else {"shapes": {}, "attention": {}}
    heads = [
        {name: [entry.get(field) for field in HEADS] for name, entry in attention.items()}
        for attention in (pruned.get("attention", {}), expected["attention"])
    ]
    if pruned.get("shapes", {}) != expected["shapes"] or heads[0] != heads[1]:
        raise ValueError(f"{path}: pruned.shapes or .attention differs from its layers; export the student again")
    if pruned.get("scales", []) not in ([], frozen_modules(anatomy)):
        raise ValueError(f"{path}: pruned.scales does not name all post-norms of the model; export the student again")


def stock_config(config: Mapping[str, Any], folder: Path) -> PreTrainedConfig:
    """Return the config object of the stock class; ValueError, naming config.json, where transformers refuses it."""
    try:
        return AutoConfig.for_model(**config)
    except Exception as fault:  # transformers' validation raises whatever a field's value leads to
        raise ValueError(
            f"{folder / 'config.json'} is refused by transformers ({_reason(fault)}); correct that field, or fetch it "
            "again"
        ) from fault


def class_shapes(config: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the class that a config describes; a tied output matrix is left out.

    Raise ValueError as `class_of`.
    """
    model = class_of(config, folder)
    tensors: dict[str, Tensor] = dict(model.named_parameters())  # a tied one comes once
    doubled = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {name: buffer for name, buffer in model.state_dict().items() if name not in doubled}
    family = family_of(config["model_type"])
    return {family.named(n): tuple(tensor.shape) for n, tensor in revert_weight_conversion(model, tensors).items()}


def class_of(config: Mapping[str, Any], folder: Path) -> PreTrainedModel:
    """Return the class that a config describes, built on the meta device.

    Raise ValueError, naming config.json, where it cannot be built.
    """
    whole = stock_config(config, folder)
    try:
        with torch.device("meta"):
            if "pruned" in config:
                return pruned_class(family_of(config["model_type"]).architecture)(whole)
            return AutoModelForCausalLM.from_config(whole)
    except Exception as fault:  # a class raises whatever a field's value leads to
        raise ValueError(
            f"{folder / 'config.json'} is refused by {config['architectures'][0]} ({_reason(fault)}); correct that "
            "field, or fetch it again"
        ) from fault


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: float,
    copy_from: Path | None = None,
) -> None:
    """Write a model folder from a stream of tensors, under their names in files, one shard in memory at a time.

    `copy_from` is a folder whose tokenizer and generation files are copied. The index and config are written last, so
    a folder with a `config.json` is complete. Raise ValueError, naming the tensor, for values that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SINGLE, INDEX):  # of an earlier attempt, whose shards may be other ones
        (folder / name).unlink(missing_ok=True)
    shards: list[list[str]] = []
    total = parameters = 0
    # our own code reads the names of the class
    family = None if "pruned" in config else FAMILIES.get(config.get("model_type", ""))
    stored = ((family.stored(name) if family else name, tensor) for name, tensor in finite(tensors))
    for shard in _shards(stored, shard_bytes):
        save_file(shard, folder / f"part-{len(shards)}.safetensors", {"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        parameters += sum(tensor.numel() for tensor in shard.values())
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for i, name in enumerate(names):
        os.replace(folder / f"part-{i}.safetensors", folder / name)
    if len(shards) > 1:
        file_of = {tensor: names[i] for i, shard in enumerate(shards) for tensor in shard}
        index = {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    if copy_from is not None:
        carry_tokenizer(copy_from, folder)
        around = Path(copy_from) / wrapper.FOLDER
        if around.is_dir() and config.get("model_type") not in WRAPPERS:
            shutil.copytree(around, folder / wrapper.FOLDER, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stored_config(config), indent=2) + "\n", encoding="utf-8")


def write_around(folder: Path, around: Around, tensors: Iterable[tuple[str, Tensor]], shard_bytes: float) -> None:
    """Write what is around the text half of a model folder, with these tensors, in place of what was carried there."""
    shutil.rmtree(folder / wrapper.FOLDER, ignore_errors=True)
    write_checkpoint(folder / wrapper.FOLDER, around.facts(), tensors, shard_bytes)


def finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield named tensors; ValueError, naming it, at the first that holds NaN or an infinity.

    One pass over the values: the least and the greatest are NaN where any value is.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            least, greatest = torch.aminmax(tensor)
            if not (torch.isfinite(least) and torch.isfinite(greatest)):
                raise ValueError(f"{name} holds values that are not finite (NaN or infinity); nothing is written of it")
        yield name, tensor


def carry_tokenizer(source: Path, folder: Path, generation: bool = True) -> None:
    """Copy the tokenizer files of a model folder, and its generation_config.json if `generation`."""
    for pattern in CARRIED if generation else CARRIED[:-1]:
        for path in Path(source).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: float) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    if not shard:
        raise ValueError(f"no tensors to write: the model is empty (limit {limit})")
    yield shard


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
        raise ValueError(f"{folder} cannot be loaded by transformers ({_reason(fault)})") from fault
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
    """Load the tokenizer of a model folder; ValueError for none, a damaged one, or untrusted code of its own.

    The configuration code of a folder of a known family is not run, even if its code is trusted.
    """
    folder = Path(folder)
    config = read_config(folder) if (folder / "config.json").exists() else {}
    known = config.get("model_type") in FAMILIES
    options = {"config": stock_config(config, folder)} if known else {}
    for pattern in (*TOKENIZER, "special_tokens_map.json", "added_tokens.json"):
        for path in folder.glob(pattern):
            check_file(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
        tokenizer(PROBE)  # a field that only encoding reads may be damaged too
    except Exception as fault:  # a damaged file raises whatever its reader, in Python or Rust, meets first
        if "trust_remote_code" in str(fault):
            raise ValueError(
                f"model.trust_remote_code is false, and the tokenizer in {folder} is code of its own; read it, and set "
                "model.trust_remote_code=true to run it"
            ) from None
        raise ValueError(
            f"the tokenizer in {folder} is missing or damaged ({_reason(fault)}); put its files (tokenizer.json or "
            "tokenizer.model, tokenizer_config.json) there again"
        ) from fault
    return tokenizer


def _reason(fault: Exception) -> str:
    """Return the type of an error and the beginning of its message, on one line."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split()):.160}"
