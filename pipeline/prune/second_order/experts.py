"""Least-squares restoration of narrowed experts: each writes what the whole one wrote for the tokens sent to it.

H = Σ a aᵀ over the neurons a of these tokens, of routed experts one matrix each, of shared experts one over all tokens.
The kept columns of W_down are then solved as those of a dense FFN (`restore.py`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import EXPERT, Anatomy
from pipeline.model.blueprint import Blueprint, LayerPlan
from pipeline.prune.passes.experts import watch_experts
from pipeline.prune.second_order.hessian import add_products, with_float64
from pipeline.prune.second_order.restore import DAMPING, restore
from pipeline.prune.surgery.reinit import Stream


@dataclass(frozen=True)
class Watched:
    """One Gram matrix [width, width] of a layer: of a routed expert, or of the shared ones together (`expert` None)."""

    name: str
    layer: int
    width: int
    expert: int | None = None


def narrowed_parts(anatomy: Anatomy, inner: bool, shared: bool) -> list[Watched]:
    """Return the matrices that the restoration of routed experts (`inner`) and of shared ones needs, by layer."""
    parts = []
    for layer in (layer for layer in range(len(anatomy.sizes.layers)) if anatomy.sparse(layer)):
        if inner:
            width, module = anatomy.sizes.carried["x"], anatomy.expert_module(layer)
            parts += [Watched(f"{module}.{each}", layer, width, each) for each in range(anatomy.sizes.carried["e"])]
        if shared and anatomy.shared_writer is not None:
            parts.append(Watched(anatomy.shared_writer.format(layer=layer), layer, anatomy.sizes.carried["y"]))
    return parts


@torch.no_grad()
def expert_grams(
    model: nn.Module, anatomy: Anatomy, batches: Iterable[Tensor], parts: Sequence[Watched]
) -> dict[str, Tensor]:
    """Return H = XᵀX [width, width] of some parts, by name, float64 and on the CPU; they add over batches and ranks.

    `model` maps ids [batch, sequence] to hidden states. Where all matrices do not fit in memory, make several passes.
    """
    place = next(model.parameters()).device
    home = with_float64(place)
    totals = {part.name: torch.zeros(part.width, part.width, dtype=torch.float64, device=home) for part in parts}
    routed: dict[int, dict[int, Tensor]] = {}
    for part in parts:
        if part.expert is not None:
            routed.setdefault(part.layer, {})[part.expert] = totals[part.name]
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    with ExitStack() as undo:
        watch_experts(model, anatomy, {layer: partial(_add, own) for layer, own in routed.items()}, undo)
        for part in parts:
            if part.expert is None:
                writer = modules[str(anatomy.shared_module).format(layer=part.layer)]
                hook = writer.register_forward_pre_hook(partial(_add_input, totals[part.name]))
                undo.callback(hook.remove)
        for ids in batches:
            model(input_ids=ids.to(place), use_cache=False)
    return {name: total.cpu() for name, total in totals.items()}


def _add(totals: Mapping[int, Tensor], expert: int, inner: Tensor, values: Tensor, weight: Tensor) -> None:
    if expert in totals:
        add_products(totals[expert], inner)


def _add_input(total: Tensor, module: nn.Module, inputs: tuple) -> None:
    add_products(total, inputs[0])


def restore_experts(
    anatomy: Anatomy,
    blueprint: Blueprint,
    source: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    stream: Stream,
    damping: float = DAMPING,
) -> Iterator[tuple[str, Tensor]]:
    """Yield a cut stream with W_down of narrowed experts restored from the source's whole ones.

    `grams` gives H by the names of `narrowed_parts` and may be lazy. An expert that no calibration token was sent to
    stays as it was cut. Raise ValueError where a Gram matrix is missing, with its name.
    """
    student, shared = blueprint.student(anatomy), f"{anatomy.shared_writer}.weight"
    places = {
        name.format(layer=place): (name, plan)
        for place, plan in enumerate(blueprint.layers)
        for name in (*(student.expert_writers if plan.expert_neurons else ()), *([shared] if plan.shared else []))
    }
    channels = torch.tensor(blueprint.channels)
    for stored, tensor in stream:
        if stored in places:
            name, plan = places[stored]
            if name == shared:
                module = name.removesuffix(".weight").format(layer=plan.host)
                whole = source[f"{module}.weight"]
                tensor = _solved(tensor, whole, _gram(grams, module), plan.shared, channels, damping)
            else:
                tensor = _of_routed(anatomy, student, plan, name, tensor, source, grams, channels, damping)
        yield stored, tensor


def _of_routed(
    anatomy: Anatomy,
    student: Anatomy,
    plan: LayerPlan,
    name: str,
    tensor: Tensor,
    source: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    channels: Tensor,
    damping: float,
) -> Tensor:
    """Return a tensor of the student, of one expert or of all, with its columns solved for the source's experts."""
    experts = plan.experts or tuple(range(anatomy.sizes.carried["e"]))
    module = anatomy.expert_module(plan.host)
    if name in student.expert_of:
        pattern, place = student.expert_of[name]
        whole = source[pattern.replace(EXPERT, str(experts[place])).format(layer=plan.host)]
        gram = _gram(grams, f"{module}.{experts[place]}")
        return _solved(tensor, whole, gram, plan.expert_neurons[place], channels, damping)
    transposed = anatomy.layer_tensors[name][0].index("x") < anatomy.layer_tensors[name][0].index("h")
    whole, solved = source[name.format(layer=plan.host)], []
    for place, expert in enumerate(experts):
        pair = (tensor[place].T, whole[expert].T) if transposed else (tensor[place], whole[expert])
        gram = _gram(grams, f"{module}.{expert}")
        own = _solved(*pair, gram, plan.expert_neurons[place], channels, damping)
        solved.append(own.T if transposed else own)
    return torch.stack(solved)


def _solved(
    narrow: Tensor, whole: Tensor, gram: Tensor, kept: Sequence[int], channels: Tensor, damping: float
) -> Tensor:
    """Return narrow [h', kept] with the columns of whole [h, width] solved for H, if any token was seen."""
    if len(kept) == whole.shape[1] or not gram.any():
        return narrow
    return restore(whole, gram, kept, damping)[channels].to(narrow)


def _gram(grams: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in grams:
        raise ValueError(f"no Gram matrix of {name}, whose neurons are to be restored; measure its layer")
    return grams[name]
