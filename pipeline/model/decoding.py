"""Writing token by token: the cache in a model's output, and the choice of the next token."""

import inspect
from typing import Any

import torch
from torch import Tensor

from pipeline.model.causal import CausalModel


def cache_name(model: CausalModel) -> str:
    """Return the argument that takes a cache: `cache`, or `past_key_values` in earlier releases of transformers."""
    return "cache" if "cache" in inspect.signature(inspect.unwrap(model.forward)).parameters else "past_key_values"


def cache_of(step: Any) -> Any:
    """Return the cache in a model's output."""
    return step["cache"] if "cache" in step else step["past_key_values"]


def drawn(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """Return ids [b] drawn from softmax(logits / temperature) of logits [b, v], in float32 or better.

    `noise` [b, v] is exponentially distributed: argmax p / e has the distribution p.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    return (torch.softmax(logits.to(exact) / temperature, -1) / noise).argmax(-1)
