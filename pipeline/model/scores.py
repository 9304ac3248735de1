"""Importance scores of a model, saved beside what made them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How much each part of a model matters; higher is kept (Pangu Light eq. 1-4)."""

    channels: Tensor  # [h]
    heads: tuple[Tensor, ...]  # per layer [n]
    neurons: tuple[Tensor, ...]  # per layer [f]
    layers: Tensor  # [layer], 1 - mean cosine of input and output
    tokens: int

    def items(self) -> Iterator[tuple[str, Tensor]]:
        yield "channels", self.channels
        yield "layers", self.layers
        for layer, (heads, neurons) in enumerate(zip(self.heads, self.neurons, strict=True)):
            yield f"heads.{layer}", heads
            yield f"neurons.{layer}", neurons

    def save(self, path: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.items()}, path, {"tokens": str(self.tokens)})

    @staticmethod
    def load(path: Path) -> "Scores":
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            tokens = int(file.metadata()["tokens"])
        count = len(tensors["layers"])
        heads = tuple(tensors[f"heads.{layer}"] for layer in range(count))
        neurons = tuple(tensors[f"neurons.{layer}"] for layer in range(count))
        return Scores(tensors["channels"], heads, neurons, tensors["layers"].to(torch.float64), tokens)
