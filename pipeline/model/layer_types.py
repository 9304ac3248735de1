"""Kinds of layers: layers of one kind have the same tensors and the same entries in every per-layer list."""

from collections.abc import Mapping
from typing import Any

PER_LAYER_LISTS = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "layers_block_type",
    "attention_layers",
    "indexer_types",
)  # config fields with one entry a layer


def layer_types(
    config: Mapping[str, Any], absent: list[frozenset[str]]
) -> tuple[tuple[str, ...], dict[str, frozenset[str]]]:
    """Return a type for each layer, and which optional prefixes the layers of a type lack.

    Layers have one type where all their per-layer config entries agree and they have the same tensors. It is the entry
    of `layer_types`, followed by what else distinguishes layers.
    """
    count = len(absent)
    types = config.get("layer_types") or ["full_attention"] * count
    labels = [[str(kind)] for kind in types]
    for name in PER_LAYER_LISTS:
        values = config.get(name)
        if name != "layer_types" and isinstance(values, list) and len(values) == count:
            _distinguish(labels, [f"{name} {value}" for value in values])
    _distinguish(labels, [f"without {' '.join(sorted(gone))}" if gone else "" for gone in absent])
    joined = tuple(", ".join(filter(None, label)) for label in labels)
    return joined, dict(zip(joined, absent))


def _distinguish(labels: list[list[str]], values: list[str]) -> None:
    """Append the values to the labels where equal labels have different values."""
    pairs = {(tuple(label), value) for label, value in zip(labels, values)}
    if len(pairs) > len({label for label, _ in pairs}):
        for label, value in zip(labels, values):
            label.append(value)
