"""The masked teacher: a whole model that computes what a student cut from it computes."""

import copy

import torch
from torch import nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything, whole_layer
from pipeline.prune.head_norms import spans


def plan_of(anatomy: Anatomy, axis: str) -> Blueprint:
    """Return a blueprint that has fewer of one axis, or of `all` axes that the family can cut.

    Where the class computes the head size as hidden size / heads, heads and hidden channels are cut together.
    """
    fixed = set(anatomy.family.fixed)
    axes = {"layers", "hidden", "heads", "groups", "neurons"} - fixed if axis == "all" else {axis} - fixed
    sizes = anatomy.sizes
    whole = everything(sizes)
    coupled = anatomy.whole_heads and bool({"hidden", "heads", "groups"} & axes)
    hosts = range(0, len(sizes.layers), 2) if "layers" in axes else range(len(sizes.layers))
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


@torch.no_grad()
def mask(model: nn.Module, anatomy: Anatomy, blueprint: Blueprint) -> None:
    """Make a model compute what the student of a blueprint without donations computes.

    Dropped layers pass the hidden state on; columns of W_O and W_down of dropped heads and neurons are zero; nothing
    writes to dropped channels, and every norm over channels, or over all heads, is taken over the kept ones.
    """
    family, sizes = anatomy.family, anatomy.sizes
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    channels = torch.tensor(blueprint.channels)
    gone = torch.ones(sizes.hidden, dtype=torch.bool)
    gone[channels] = False
    for name, ((*axes,), *_) in anatomy.outer_tensors.items():
        if name == anatomy.embedding or "norm" not in name and "h" in axes and name != anatomy.head:
            state[name].transpose(0, axes.index("h"))[gone] = 0.0
    outer_norms = {name.rpartition(".")[0] for name in family.outer if "norm" in name and name in anatomy.outer}
    for name in {family.final_norm} | outer_norms:
        _restrict(model, name, channels)
    plans = {plan.host: plan for plan in blueprint.layers}
    for layer in range(len(sizes.layers)):
        prefix = family.prefix.format(layer=layer)
        if layer not in plans:
            model.get_submodule(prefix.rstrip(".")).forward = _passing_tuple if family.tuples else _passing
            continue
        for norm in (*family.pre_norms, *family.post_norms):
            _restrict(model, prefix + norm, channels)
        plan, size = plans[layer], sizes.head_size
        heads = [head for group in plan.groups for head in group.heads]
        kept = {
            "n d": torch.tensor([head * size + i for head in heads for i in range(size)]),
            "k d": torch.tensor([group.kv * size + i for group in plan.groups for i in range(size)]),
            "f": torch.tensor(plan.neurons),
        }
        for name, (axis, power) in spans(anatomy).items():
            if power < 0:
                _restrict(model, name.format(layer=layer).removesuffix(".weight"), kept[axis])
        for axis in ("n d", "f"):
            writer = anatomy.writer(axis)
            if writer is not None and f"{writer}.weight".format(layer=layer) in state:
                weight = state[f"{writer}.weight".format(layer=layer)]
                columns = weight if family.transposed else weight.T
                dropped = torch.ones(len(columns), dtype=torch.bool)
                dropped[kept[axis]] = False
                columns[dropped] = 0.0
        for name, segments in anatomy.layer_tensors.items():
            pattern = family.layer[name.removeprefix(family.prefix)]
            writes = segments[0][-1 if family.transposed else 0 : None if family.transposed else 1] == ("h",)
            norm = name.removeprefix(family.prefix).rpartition(".")[0] in {**family.pre_norms, **family.post_norms}
            if writes and not norm and anatomy.has(name, layer) and "e" not in pattern:
                tensor = state[name.format(layer=layer)]
                (tensor.transpose(0, -1) if family.transposed else tensor)[gone] = 0.0


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


def _passing(hidden_states: torch.Tensor, *rest, **named) -> torch.Tensor:
    return hidden_states


def _passing_tuple(hidden_states: torch.Tensor, *rest, **named) -> tuple[torch.Tensor, None]:
    return hidden_states, None
