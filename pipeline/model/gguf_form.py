"""GGUF, the file format of llama.cpp: the model types that it computes as transformers does, and what is adapted.

llama.cpp has a graph of its own for each model type. Some take facts from the published models instead of the file: the
order of sliding-window layers, the scale of attention. A pruned model may have others, and would be computed wrongly
without an error.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.model.families import family_of

WINDOWS = "{architecture}.attention.sliding_window_pattern"  # the field that states the order of the layers
SCALAR = "query_pre_attn_scalar"


@dataclass(frozen=True)
class Graph:
    """What llama.cpp's graph of a model type does not read from the file."""

    windows: bool = False  # the order of sliding-window layers, unless the file states it
    # The module that the scale of attention is folded into: the graph divides by the square root of the head size, and
    # of hidden size / heads if the model has `published` layers.
    scaled: str | None = None
    published: int | None = None


# By model_type. tests/serving compares each with transformers by llama.cpp itself.
GRAPHS: Mapping[str, Graph] = {
    "llama": Graph(),
    "mistral": Graph(),
    "qwen2": Graph(),
    "qwen3": Graph(),
    "phi3": Graph(),
    "gemma": Graph(),
    "gemma2": Graph(windows=True, scaled="self_attn.q_proj", published=46),
    "gemma3_text": Graph(windows=True, scaled="self_attn.q_norm", published=62),
}


def graph_of(config: Mapping[str, Any]) -> Graph:
    """Return the graph that computes a model; raise ValueError where there is none that does it as transformers."""
    kind = config.get("model_type")
    graph = GRAPHS.get(str(kind))
    if graph is None:
        raise ValueError(
            f"export.gguf: llama.cpp has not been compared with transformers for the model type {kind}; set "
            f"export.gguf=null (compared: {', '.join(GRAPHS)})"
        )
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and not graph.windows and window < config.get("max_position_embeddings", window):
        raise ValueError(
            f"export.gguf: llama.cpp computes {kind} without sliding windows, and its config.json has one of {window} "
            "tokens; set export.gguf=null"
        )
    return graph


def windows_of(config: Mapping[str, Any], graph: Graph) -> list[bool] | None:
    """Return for each layer whether it has a sliding window; None where the graph takes it from the file anyway."""
    types = config.get("layer_types")
    if not graph.windows or not types:
        return None
    return [kind == "sliding_attention" for kind in types]


def query_factor(config: Mapping[str, Any], graph: Graph) -> float:
    """Return the factor of the queries with which the graph's scale of attention gives the model's scores."""
    if graph.scaled is None or config.get(SCALAR) is None:
        return 1.0
    return math.sqrt(_assumed(config, graph) / config[SCALAR])


def _assumed(config: Mapping[str, Any], graph: Graph) -> int:
    """Return the number whose square root the graph divides scores by."""
    family = family_of(config["model_type"])
    if family.width(config, "layers") == graph.published:
        return family.width(config, "hidden") // family.width(config, "heads")
    return family.width(config, "head_size")


def folded(
    config: Mapping[str, Any], graph: Graph, tensors: Iterable[tuple[str, Tensor]]
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Return config and tensors of the same network with the scale of attention that the graph assumes.

    The queries of every layer are multiplied, in float32 or better, by `query_factor`: the gain of their norm, or their
    projection.
    """
    factor, family = query_factor(config, graph), family_of(config["model_type"])
    module = f".{graph.scaled}."
    offset = family.norm_offset if module.endswith("norm.") else 0.0

    def scaled() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if module in name:
                exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                tensor = (exact + offset) * factor - offset
            yield name, tensor

    return dict(config) | {SCALAR: _assumed(config, graph)}, scaled()
