"""The masked teacher: a whole model that computes what a student cut from it computes."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything, whole_layer
from pipeline.model.families import Family
from pipeline.prune.head_norms import spans
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.tiny import config_of, tensors_of


def plan_of(anatomy: Anatomy, axis: str) -> Blueprint:
    """Return a blueprint that has fewer of one axis, or of `all` axes that the family can cut.

    Where the class computes the head size as hidden size / heads, heads and hidden channels are cut together.
    """
    fixed = set(anatomy.family.fixed)
    axes = {"layers", "hidden", "heads", "groups", "neurons"} - fixed if axis == "all" else {axis} - fixed
    sizes = anatomy.sizes
    whole = everything(sizes)
    coupled = anatomy.whole_heads and bool({"hidden", "heads", "groups"} & axes)
    hosts = range(len(sizes.layers))
    if "layers" in axes:
        others = [host for host in hosts if host not in anatomy.required_layers]
        hosts = sorted({*anatomy.required_layers, *others[bool(anatomy.required_layers) :: 2]})
    plans = [_narrow(sizes, whole_layer(sizes, host), axes, coupled) for host in hosts]
    hidden = sizes.hidden
    if coupled:
        hidden = sum(len(group.heads) for group in plans[0].groups) * sizes.head_size
    elif "hidden" in axes:
        hidden = hidden * 3 // 4
    channels = sorted(torch.randperm(sizes.hidden, generator=torch.Generator().manual_seed(1))[:hidden].tolist())
    return Blueprint(tuple(channels) if hidden < sizes.hidden else whole.channels, tuple(plans))


def _narrow(sizes, plan: LayerPlan, axes: set[str], coupled: bool) -> LayerPlan:
    groups = plan.groups
    several = len(groups[0].heads) > 1
    if len(groups) > 1 and ("groups" in axes or (coupled and not several)):
        groups = groups[1:] if several or len(groups) == 2 else groups[1::2]
    if several and ("heads" in axes or (coupled and groups == plan.groups)):
        groups = tuple(Group(g.layer, g.kv, g.heads[g.kv % 2 :: 2]) for g in groups)
    elif "heads" in axes and not several and "groups" not in axes:
        groups = groups[1::2]
    neurons = plan.neurons
    if "neurons" in axes:
        neurons = tuple(n for n in neurons if n % 3)
    return LayerPlan(plan.host, groups, neurons)


def lacking_sublayers(anatomy: Anatomy) -> Blueprint:
    """Return a blueprint without the attention of the last layer and of the first, if another of its kind is left, and
    without the FFN of the others, where the family can lose them."""
    whole = everything(anatomy.sizes)
    last = len(whole.layers) - 1
    ends = {0, last} if anatomy.layer_types[0] in anatomy.layer_types[1:last] else {last}
    plans = []
    for layer, plan in enumerate(whole.layers):
        if layer in ends and "attention_layers" in anatomy.family.sublayers:
            plan = replace(plan, groups=())
        elif layer not in (0, last) and "ffn_layers" in anatomy.family.sublayers:
            plan = replace(plan, neurons=())
        plans.append(plan)
    return Blueprint(whole.channels, tuple(plans))


@torch.no_grad()
def masked(model: PreTrainedModel, anatomy: Anatomy, blueprint: Blueprint, folder: Path) -> PreTrainedModel:
    """Return a model of the source's shapes that computes what the student of a blueprint without donations computes.

    The source itself is changed where its parameters are its checkpoint tensors.

    Dropped layers pass the hidden state on. A dropped attention or FFN writes zero, its bias included. Columns of W_O
    and W_down of dropped heads and neurons are zero; nothing writes to dropped channels, and every norm over channels,
    or over all heads, is taken over the kept ones. Experts that are dropped are never chosen (`never_routed`).
    """
    family = anatomy.family
    state, teacher = tensors_of(model), model
    plans = {plan.host: plan for plan in blueprint.layers}
    _silence(state, anatomy, blueprint)
    if family.experts:  # whose checkpoint tensors are copies of parts of the class's
        write_checkpoint(folder, config_of(model) | {"architectures": [family.architecture]}, state.items(), 1e9)
        teacher = load_model(folder, model.dtype, "eager")
        teacher.set_experts_implementation("eager")
    channels = torch.tensor(blueprint.channels)
    outer_norms = {
        name.rpartition(".")[0]
        for name, axes in family.outer.items()
        if "norm" in name and name in anatomy.outer and axes == "h"
    }
    for name in {family.final_norm} | outer_norms:
        _restrict(teacher, name, channels)
    for layer in range(len(anatomy.sizes.layers)):
        prefix = family.prefix.format(layer=layer)
        if layer not in plans:
            teacher.get_submodule(prefix.rstrip(".")).forward = partial(_passing, family)
            continue
        for norm in (*family.pre_norms, *family.post_norms):
            _restrict(teacher, prefix + norm, channels)
        kept = _kept(anatomy, plans[layer])
        for name, (axis, power) in spans(anatomy).items():
            if power < 0 and plans[layer].groups:
                _restrict(teacher, name.format(layer=layer).removesuffix(".weight"), kept[axis])
    return teacher


def _kept(anatomy: Anatomy, plan: LayerPlan) -> dict[str, torch.Tensor]:
    """Return the positions that stay on the axes of a layer."""
    size = anatomy.sizes.head_size
    heads = [head for group in plan.groups for head in group.heads]
    return {
        "n d": torch.tensor([head * size + i for head in heads for i in range(size)], dtype=torch.int64),
        "k d": torch.tensor([group.kv * size + i for group in plan.groups for i in range(size)], dtype=torch.int64),
        "f": torch.tensor(plan.neurons, dtype=torch.int64),
    }


def _silence(state: dict[str, torch.Tensor], anatomy: Anatomy, blueprint: Blueprint) -> None:
    """Zero, in place, what a dropped head or neuron writes and whatever is written to a dropped channel."""
    family, sizes = anatomy.family, anatomy.sizes
    gone = torch.ones(sizes.hidden, dtype=torch.bool)
    gone[torch.tensor(blueprint.channels)] = False
    norms = {**family.pre_norms, **family.post_norms}
    for name, ((*axes,), *_) in anatomy.outer_tensors.items():
        if name == anatomy.embedding or ("norm" not in name and "h" in axes and name != anatomy.head):
            state[name].transpose(0, axes.index("h"))[gone] = 0.0
    for plan in blueprint.layers:
        kept = _kept(anatomy, plan)
        for axis in ("n d", "f"):
            name = f"{anatomy.writer(axis)}.weight".format(layer=plan.host)
            if name in state:
                columns = state[name] if family.transposed else state[name].T
                dropped = torch.ones(len(columns), dtype=torch.bool)
                dropped[kept[axis]] = False
                columns[dropped] = 0.0
                bias = f"{anatomy.writer(axis)}.bias".format(layer=plan.host)
                if dropped.all() and bias in state:
                    state[bias].zero_()
        for name, segments in anatomy.layer_tensors.items():
            module = name.removeprefix(family.prefix).rpartition(".")[0]
            if module not in norms and anatomy.has(name, plan.host):
                axes = segments[0]
                along = writes_along(axes, family.transposed)
                if along is not None:
                    state[name.format(layer=plan.host)].transpose(0, along)[gone] = 0.0


def writes_along(axes: tuple[str, ...], transposed: bool) -> int | None:
    """Return the dimension over hidden channels of a tensor that writes to them: first, or last where transposed."""
    if axes in (("e", "x", "h"), ("e", "h")) and axes != ("e", "h"):
        return 2
    if axes == ("e", "h", "x"):
        return 1
    if axes[-1:] == ("h",) and (transposed or len(axes) == 1):
        return len(axes) - 1
    return 0 if axes[:1] == ("h",) and not transposed else None


def _restrict(model: nn.Module, name: str, kept: torch.Tensor) -> None:
    """Make a norm compute over the kept channels only and return zero on the others."""
    module = model.get_submodule(name)
    narrow = copy.deepcopy(module)
    for kind, parameter in list(narrow.named_parameters()):
        setattr(narrow, kind, nn.Parameter(parameter[kept]))
    if hasattr(narrow, "normalized_shape"):
        narrow.normalized_shape = (len(kept),)

    def forward(hidden: torch.Tensor, *rest, **named) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        output[..., kept] = narrow(hidden[..., kept], *rest, **named)
        return output

    module.forward = forward


def _passing(family: Family, hidden_states: torch.Tensor, *rest, **named):
    return (hidden_states, named.get(str(family.passes_on))) if family.tuples else hidden_states
