"""Edits of tokenizer.json and tokenizer_config.json for a tokenizer with fewer tokens."""

from collections.abc import Mapping
from typing import Any

from pipeline.model.token_ids import Renumbering
from pipeline.prune.vocabulary.pieces import pieces_of

Fields = dict[str, Any]


def renumbered_tokenizer(document: Mapping[str, Any], new: Renumbering) -> Fields:
    """Return a tokenizer.json with the kept tokens only, under their new ids.

    Merges whose parts or result are not kept are left out. Raise ValueError for a model or a post-processor that is
    unknown, and for an added token that is not kept.
    """
    edited = {**document, "model": pieces_of(document).renumbered(new)}
    edited["added_tokens"] = [token | {"id": new[token["id"]]} for token in document.get("added_tokens") or ()]
    if document.get("post_processor"):
        edited["post_processor"] = _post_processor(document["post_processor"], new)
    if document.get("padding"):
        edited["padding"] = document["padding"] | {"pad_id": new[document["padding"]["pad_id"]]}
    return edited


def renumbered_settings(fields: Mapping[str, Any], new: Renumbering) -> Fields:
    """Return a tokenizer_config.json with new ids."""
    edited = dict(fields)
    if "added_tokens_decoder" in fields:
        edited["added_tokens_decoder"] = {
            str(new[int(number)]): token for number, token in fields["added_tokens_decoder"].items()
        }
    return edited


def _post_processor(processor: Mapping[str, Any], new: Renumbering) -> Fields:
    kind = processor["type"]
    if kind == "Sequence":
        return {**processor, "processors": [_post_processor(each, new) for each in processor["processors"]]}
    if kind == "TemplateProcessing":
        special = {
            name: token | {"ids": [new[number] for number in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": special}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**processor, **{name: [processor[name][0], new[processor[name][1]]] for name in ("sep", "cls")}}
    if kind == "ByteLevel":
        return dict(processor)
    raise ValueError(f"the tokenizer's post-processor is {kind}, which is unknown here; report it")
