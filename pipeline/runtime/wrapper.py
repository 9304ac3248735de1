"""The vision tower, projector and config.json of an image-text model, carried beside its text half.

A teacher or student of such a model is stored as a text model with a folder `wrapper` in it, which holds the tensors of
the vision tower and the projector, and the whole config.json.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from pipeline.model.families import FAMILIES, WRAPPERS, Wrapper
from pipeline.model.families.wrappers import POSITIONS, layout
from pipeline.model.token_ids import Renumbering

FOLDER = "wrapper"
NOT_CARRIED = ("model_type", "architectures", "rope_parameters", "transformers_version")  # of the text half's config


@dataclass(frozen=True)
class WrapperParts:
    """The config.json of an image-text model, where its text half is in the weights, and its other tensors."""

    config: Mapping[str, Any]
    prefix: str  # of the text half's tensors
    head: str  # of its output matrix
    tensors: Mapping[str, Tensor]

    @property
    def wrapper(self) -> Wrapper:
        return WRAPPERS[self.config["model_type"]]

    def facts(self) -> dict[str, Any]:
        """Return what the folder `wrapper` holds beside the tensors."""
        return {"config": dict(self.config), "prefix": self.prefix, "head": self.head}

    def stored_name(self, name: str) -> str:
        """Return the name that a tensor of the text half has in the whole model."""
        family = FAMILIES[text_config(self.config)["model_type"]]
        if name.startswith(f"{family.head}."):
            return self.head + name.removeprefix(f"{family.head}.")
        return self.prefix + name.partition(".")[2]

    def stored(self, text: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of the whole model: those of a text half, then the others."""
        for name, tensor in text:
            yield self.stored_name(name), tensor
        yield from self.tensors.items()

    def renumbered(self, new: Renumbering) -> "WrapperParts":
        """Return the parts for a text half with fewer tokens, with the ids of image tokens renumbered."""
        config = new.fields(self.config)
        return replace(self, config=config | ({"vocab_size": new.new} if "vocab_size" in config else {}))

    def injected(self) -> int:
        """Return the number of first layers that image features enter at, after the embedding."""
        return len(_field(self.config, self.wrapper.injects)) if self.wrapper.injects else 0


def whole_config(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of an image-text model, completed by what its class assumes.

    Fields are those of a checked file. Whatever transformers raises for a value passes.
    """
    config = AutoConfig.for_model(**stored)
    whole = json.loads(config.to_json_string(use_diff=False))
    dtype = stored.get("dtype") or whole["text_config"].get("dtype")
    return whole | {"dtype": dtype, "architectures": [WRAPPERS[stored["model_type"]].architecture]}


def text_config(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text half as a model of its own; ValueError where its type has no table."""
    wrapper, text = WRAPPERS[whole["model_type"]], whole["text_config"]
    kind = wrapper.texts.get(text["model_type"], text["model_type"])
    if kind not in FAMILIES or not FAMILIES[kind].prefix.startswith("model."):
        raise ValueError(
            f"text_config is of model_type {text['model_type']!r}, which has no table that fits an image-text model; "
            "docs/models.md lists those that have one"
        )
    edited = {name: value for name, value in text.items() if name != "transformers_version"} | {
        "model_type": kind,
        "architectures": [FAMILIES[kind].architecture],
        "tie_word_embeddings": whole["tie_word_embeddings"],
        "dtype": whole["dtype"],
    }
    if isinstance(text.get("rope_parameters"), dict):
        rope = {name: value for name, value in text["rope_parameters"].items() if name not in POSITIONS}
        edited["rope_parameters"] = rope
    return edited


def wrapped_config(whole: Mapping[str, Any], student: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """Return the config.json of an image-text model whose text half has the config `student` and `hidden` channels."""
    before = text_config(whole)
    changed = {name: value for name, value in student.items() if name not in NOT_CARRIED and before.get(name) != value}
    edited = json.loads(json.dumps(whole)) | {name: student[name] for name in ("tie_word_embeddings", "dtype")}
    edited["text_config"] |= changed
    for name in WRAPPERS[whole["model_type"]].follows:
        section, _, leaf = name.partition(".")
        edited[section][leaf] = hidden
    return edited


def wrapper_parts_of(whole: Mapping[str, Any], tensors: Mapping[str, Tensor], beside: list[str]) -> WrapperParts:
    """Return the parts of a model folder outside the text half; `beside` names their tensors."""
    prefix, head = layout(tensors)
    return WrapperParts(whole, prefix, head, Subset(tensors, beside))


class Subset(Mapping[str, Tensor]):
    """Some tensors of a lazy mapping."""

    def __init__(self, tensors: Mapping[str, Tensor], names: list[str]):
        self._tensors, self._names = tensors, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _field(config: Mapping[str, Any], name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value
