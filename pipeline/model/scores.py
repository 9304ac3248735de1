"""Importance scores of a model, saved beside what made them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """How much each part of a model matters; higher is kept (Pangu Light eq. 1-4)."""

    channels: Tensor  # [h]
    heads: tuple[Tensor, ...]  # per layer [n]
    neurons: tuple[Tensor, ...]  # per layer [f]
    layers: Tensor  # [layer], 1 - mean cosine of input and output
    tokens: int
    # [2, layer]: what the scores of heads and of neurons are divided by where layers are compared; None: by their own
    # standard deviations
    deviations: Tensor | None = None

    def with_units(
        self, heads: Sequence[Tensor], neurons: Sequence[Tensor], deviations: Tensor | None = None
    ) -> "Scores":
        """Return the same scores of channels and layers with others of heads and neurons."""
        return replace(self, heads=tuple(heads), neurons=tuple(neurons), deviations=deviations)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        yield "channels", self.channels
        yield "layers", self.layers
        for layer, (heads, neurons) in enumerate(zip(self.heads, self.neurons, strict=True)):
            yield f"heads.{layer}", heads
            yield f"neurons.{layer}", neurons
        if self.deviations is not None:
            yield "deviations", self.deviations

    def save(self, folder: Path) -> None:
        """Write the scores into a folder."""
        tensors = {name: values.contiguous() for name, values in self.items()}
        save_file(tensors, folder / FILE, {"tokens": str(self.tokens)})

    @staticmethod
    def load(folder: Path) -> "Scores":
        """Read the scores of a folder."""
        path = folder / FILE
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            tokens = int(file.metadata()["tokens"])
        count = len(tensors["layers"])
        heads = tuple(tensors[f"heads.{layer}"] for layer in range(count))
        neurons = tuple(tensors[f"neurons.{layer}"] for layer in range(count))
        layers = tensors["layers"].to(torch.float64)
        return Scores(tensors["channels"], heads, neurons, layers, tokens, tensors.get("deviations"))
