"""Hugging Face model folders, read lazily."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.model import decilm
from pipeline.model.anatomy import Anatomy, anatomy_of
from pipeline.model.families import FAMILIES, WRAPPERS, Family, family_of
from pipeline.model.families.wrappers import text_names
from pipeline.model.hf_config import frozen_modules, per_layer
from pipeline.model.layer_types import PER_LAYER_LISTS
from pipeline.runtime import wrapper
from pipeline.runtime.config_bounds import check_experts, check_length
from pipeline.runtime.described import read_config, read_mapping, wrapper_config
from pipeline.runtime.model_class import class_shapes, reason, stated_fields, stock_config
from pipeline.runtime.modelling import HEADS
from pipeline.runtime.weight_files import FLOATING, Tensors
from pipeline.runtime.weight_names import PREDICTION, canonical_names
from pipeline.runtime.wrapper import WrapperParts

FROM_CLASS = ("head_size", "groups", "neurons", "layers", "hidden", "heads")  # widths, where config.json is silent


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
        self.wrapper_parts: WrapperParts | None = None  # vision tower and projector, of an image-text model
        self.wrapped = False  # whether the folder holds the whole of it
        if self.config.get("model_type") == decilm.MODEL_TYPE:
            self.config = self._plain_decilm()
        if self.config.get("model_type") in FAMILIES:
            family = family_of(self.config["model_type"])
            self._complete(family)
            self.wrapper_parts, text = self._wrapper_parts(family)
            names, left_out = canonical_names(text, self.config, self.folder)
            self._stored = {name: text[own] for name, own in names.items()}
            if left_out:
                count = f"{len(left_out)} tensors that the class does not have"
                self.notes.append(f"{count} are left out: {', '.join(left_out[:2])}{', ...' if left_out[2:] else ''}")
            self._tie()

    def _complete(self, family: Family) -> None:
        """Set the fields that config.json leaves to the class, and drop those that other fields replace."""
        whole = stock_config(self.config, self.folder)
        if family.layer_fields:
            whole.allow_global_per_layer_attribute_access = True  # of fields that single layers have of their own
        lengths = {name for terms in family.lengths.values() for term in terms for name in term.split("*")}
        own = (*family.experts, family.top_k, family.leading_dense, *family.layer_indices, *family.depth_scaled)
        own = (*own, *family.repeated, *filter(None, (family.reusing, family.double_wide)))
        fields = (*(family.field(width) for width in FROM_CLASS), *sorted(lengths), *own)
        lists = [name for name in PER_LAYER_LISTS if name in vars(whole)]  # some classes compute them
        self.config |= {
            field: value
            for field in ("tie_word_embeddings", *lists, *filter(None, fields))
            if self.config.get(field) in (None, []) and (value := getattr(whole, field, None)) is not None
        }
        if family.layer_fields:
            by_layer = stated_fields(whole, self.folder).get(family.layer_fields) or {}
            self.config[family.layer_fields] = {str(int(layer)): dict(fields) for layer, fields in by_layer.items()}
        path, layers = self.folder / "config.json", str(family.field("layers"))
        for name in (name for name in PER_LAYER_LISTS if self.config.get(name) == []):
            check_length(name, [], layers, self.config[layers], path)
        check_experts(self.config, family, path)
        for field in family.superseded:
            self.config.pop(field, None)
        if family.adjusted and getattr(whole, family.adjusted[0], False):
            field, tensor = family.adjusted
            name = family.prefix.format(layer=0) + tensor
            if name in self._tensors:
                self.config |= {field: False, str(family.field("neurons")): self._tensors.shape(name)[0]}

    def _wrapper_parts(self, family: Family) -> tuple[WrapperParts | None, dict[str, str]]:
        """Return the parts beside the text half, if any, and the stored name of each tensor of the half by its name."""
        inside, stored = self.folder / wrapper.FOLDER, read_mapping(self.folder / "config.json")
        if stored.get("model_type") in WRAPPERS:
            text = text_names(self._tensors, family)
            taken = set(text.values())
            beside = [name for name in self._tensors if name not in taken and not PREDICTION.search(name)]
            self.wrapped = True
            whole = wrapper_config(stored, self.folder / "config.json")
            return wrapper.wrapper_parts_of(whole, self._tensors, beside), text
        wrapper_parts = None
        if inside.is_dir():
            facts = read_mapping(inside / "config.json")
            wrapper_parts = WrapperParts(facts["config"], facts["prefix"], facts["head"], Tensors(inside, False))
        return wrapper_parts, {name: name for name in self._tensors}

    @property
    def anatomy(self) -> Anatomy:
        """Return the anatomy; ValueError for an unknown family or a checkpoint that does not match its table."""
        if "model_type" not in self.config:
            path = self.folder / "config.json"
            raise ValueError(f"{path} has no model_type; give a model folder of transformers, or fetch it again")
        anatomy = anatomy_of(self.config, self)
        whole_heads = anatomy.whole_heads or (self.wrapper_parts is not None and self.wrapper_parts.wrapper.whole_heads)
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
                f"{self.folder / 'config.json'} is not in the DeciLM form ({reason(fault)}); export the model again"
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
    if any(pruned.get(name) != expected.get(name) for name in ("removed", "cache")):
        raise ValueError(f"{path}: pruned.removed or .cache differs from its layers; export the student again")
    if pruned.get("scales", []) not in ([], frozen_modules(anatomy)):
        raise ValueError(f"{path}: pruned.scales does not name all post-norms of the model; export the student again")
