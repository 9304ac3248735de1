"""Importance scores of a model, saved beside what made them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "scores.safetensors"
TOKENS, WEIGHTS, NORMS, PRODUCTS = range(4)  # rows of routing: tokens, sums of router weight g, of norm |f|, of g |f|
OF_EXPERTS = ("experts", "expert_neurons", "routing", "shared")


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
    experts: tuple[Tensor, ...] = ()  # per layer [e]; of no expert where a layer has none
    expert_neurons: tuple[Tensor, ...] = ()  # per layer [e, x]
    routing: tuple[Tensor, ...] = ()  # per layer [4, e]: sums over the tokens routed to each expert
    shared: tuple[Tensor, ...] = ()  # per layer [y]: of the neurons of shared experts

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
        for kind in OF_EXPERTS:
            for layer, values in enumerate(getattr(self, kind)):
                if values.numel():
                    yield f"{kind}.{layer}", values

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
        of_experts = {kind: _of_layers(tensors, kind, count) for kind in OF_EXPERTS}
        return Scores(tensors["channels"], heads, neurons, layers, tokens, tensors.get("deviations"), **of_experts)


def _of_layers(tensors: Mapping[str, Tensor], kind: str, count: int) -> tuple[Tensor, ...]:
    """Return a kind of scores of experts by layer, none where no layer has experts."""
    if not any(name.startswith(f"{kind}.") for name in tensors):
        return ()
    return tuple(tensors.get(f"{kind}.{layer}", torch.zeros(0, dtype=torch.float64)) for layer in range(count))
