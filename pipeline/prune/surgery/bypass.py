"""A linear map in place of removed layers, folded into the W_down before them (ReplaceMe, 2505.02819).

With C [tokens, h] what the FFN of the last remaining layer adds to the residual stream, h its output and h' the stream
after the removed layers, T = I + (CᵀC + λI)⁻¹ Cᵀ(h' - h) minimises ‖h' - h - C(T - I)‖² + λ‖T - I‖², and
W_down' = Tᵀ W_down gives the student the stream h + C(T - I). No parameter is added, and the class is unchanged.
ReplaceMe shrinks T to zero; shrinking it to the identity makes plain removal the limit of strong damping.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.prune.passes.branches import ffn_parts, silenced
from pipeline.prune.passes.layerwise import layers_of, recorded
from pipeline.prune.second_order.hessian import projections, with_float64


@dataclass(frozen=True)
class Sums:
    """Sums over tokens, in float64: CᵀC [h, h], Cᵀ(h' - h) [h, h] and ‖h' - h‖² [1]."""

    gram: Tensor
    cross: Tensor
    gap: Tensor

    def tensors(self) -> list[Tensor]:
        """Return the sums, to be added over ranks in place."""
        return [self.gram, self.cross, self.gap]

    def map(self, damping: float) -> tuple[Tensor, float]:
        """Return T [h, h] and the share of ‖h' - h‖² that remains; λ is `damping` of the mean diagonal of CᵀC.

        Raise ValueError where the FFN adds nothing to the stream.
        """
        mean = float(self.gram.diagonal().mean())
        if not mean > 0.0:
            raise ValueError("reinit.bypass: the FFN before the removed layers adds nothing; set reinit.bypass=false")
        identity = torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        change = torch.linalg.solve(self.gram + damping * mean * identity, self.cross)
        left = self.gap - 2.0 * (change * self.cross).sum() + (change * (self.gram @ change)).sum()
        return identity + change, float(left / self.gap) if float(self.gap) else 1.0


def gaps(blueprint: Blueprint, layers: int) -> dict[int, int]:
    """Return the remaining layers that removed ones follow, each with the last of these."""
    hosts = [plan.host for plan in blueprint.layers]
    after = [*hosts[1:], layers]
    return {host: until - 1 for host, until in zip(hosts, after) if until > host + 1}


def check_family(anatomy: Anatomy) -> None:
    """Raise ValueError where no linear map after the FFN can be folded into one W_down."""
    down, kind = projections(anatomy).get("f"), anatomy.family.model_type
    if down is None or any(down.endswith(f".{writer}") for writer in anatomy.family.post_norms.values()):
        end = "experts" if down is None else "a norm"
        raise ValueError(
            f"reinit.bypass: the FFN of model_type {kind!r} ends in {end}, into which no linear map can be folded; set "
            "reinit.bypass=false"
        )


@torch.no_grad()
def sums_of(
    model: nn.Module, anatomy: Anatomy, over: Mapping[int, int], batches: Iterable[Tensor], place: torch.device
) -> dict[int, Sums]:
    """Return the sums of every gap by the layer before it, in one pass through the model.

    `model` maps ids [batch, sequence] to hidden states. Memory: on `place` a layer and a batch; on the model's own
    device the streams of all batches, three times inside a gap.
    """
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    layers = layers_of(modules, anatomy)
    home, sums = next(model.parameters()).device, {}
    wide = with_float64(place)
    steps = recorded(model, layers, batches)
    host, before, added = -1, [], []
    for index, layer in enumerate(layers):
        layer.to(place)
        if index in over and steps:
            with silenced(ffn_parts(layer, anatomy, index), steps[0].hidden.to(place)):
                added = [step.through(layer, index, place).to(home) for step in steps]
        for step in steps:
            step.advance(layer, index, place)
        layer.to(home)
        if index in over:
            host, before = index, [step.hidden.clone() for step in steps]
            added = [after - read for after, read in zip(before, added)]
        if index == over.get(host):
            streams = [step.hidden for step in steps]
            sums[host] = _summed(anatomy.sizes.hidden, added, before, streams, wide)
    return sums


def _summed(hidden: int, added: list[Tensor], before: list[Tensor], after: list[Tensor], place: torch.device) -> Sums:
    zeros = torch.zeros(2 * hidden * hidden + 1, dtype=torch.float64, device=place)
    gram, cross, gap = zeros.split([hidden * hidden, hidden * hidden, 1])
    sums = Sums(gram.view(hidden, hidden), cross.view(hidden, hidden), gap)
    for part, start, end in zip(added, before, after, strict=True):
        columns = part.flatten(0, 1).to(place, torch.float64)
        wanted = end.flatten(0, 1).to(place, torch.float64) - start.flatten(0, 1).to(place, torch.float64)
        sums.gram.add_(columns.T @ columns)
        sums.cross.add_(columns.T @ wanted)
        sums.gap.add_(wanted.square().sum())
    return sums


def folded(anatomy: Anatomy, source: Mapping[str, Tensor], host: int, through: Tensor) -> dict[str, Tensor]:
    """Return W_down [h, f], and its bias [h] if there is one, of a layer followed by the map `through` [h, h]."""
    module = projections(anatomy)["f"].format(layer=host)
    names = [name for name in (f"{module}.weight", f"{module}.bias") if name in source]
    return {name: (through.T.cpu() @ source[name].to(torch.float64)).to(source[name].dtype) for name in names}


class Replaced(Mapping[str, Tensor]):
    """Tensors of a source, some of them replaced; both may be lazy."""

    def __init__(self, source: Mapping[str, Tensor], changed: Mapping[str, Tensor]):
        self._source, self._changed = source, changed

    def __getitem__(self, name: str) -> Tensor:
        return self._changed[name] if name in self._changed else self._source[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)
