"""The type of a Hugging Face causal language model in signatures."""

from typing import Any, TypeAlias

CausalModel: TypeAlias = Any  # an nn.Module; its config, decoder and head are attributes that no type checker knows
