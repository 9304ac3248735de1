"""Tiny mixtures of experts: worlds to run stages in, and models whose routers never choose some experts."""

from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline import runner
from pipeline.model.blueprint import Blueprint
from pipeline.model.causal import decoder_of
from pipeline.runtime.model_loader import load_model
from tests.tiny import TINY, family, save_tiny, tiny_model
from tests.tiny_text import configured
from tests.world import make_world, settings

CUT = "stages=[importance,shape,plan,cut]"
MIXTURES = [kind for kind in TINY if family(kind).experts]


def mixture_world(folder: Path, kind: str, dtype: torch.dtype = torch.float64, **changed) -> Path:
    """Fill a folder as `make_world` does, with a model of a type."""
    world = make_world(folder, kind)
    save_tiny(tiny_model(kind, dtype=dtype, **changed), world / "model")
    return world


def made(world: Path, *overrides: str, **values) -> dict[str, Path]:
    """Run stages on a mixture and return their artifacts by what they are read as."""
    given = {"shape__layers": None, "shape__neurons": None, "score__tokens": 512} | values
    return runner.run(configured(*settings(world, run="unit", **given), *overrides), "a test")


def loaded(folder: Path):
    """Return a model in float64, whose experts no other implementation than the class's own computes."""
    model = load_model(folder, torch.float64, "eager")
    model.set_experts_implementation("eager")
    return model


def sent_to(expert: int, total: int, states, *routing):
    """Return the states [t, h] that an expert reads, and their weights [t], of what a module of experts is given."""
    if not routing:  # the states of all experts, which the router's weights scale already
        own = states.unflatten(0, (total, -1))[expert]
        own = own[own.any(1)]
        return own, torch.ones(len(own), dtype=own.dtype)
    chosen, weights = routing
    return states[(chosen == expert).any(1)], weights[chosen == expert]


def given_to(expert: int, total: int, state, scaled: bool):
    """Return what a module of experts is given to compute one expert for one state [h], with weight 1."""
    if scaled:
        return (torch.stack([state * (each == expert) for each in range(total)]),)
    return state[None], torch.tensor([[expert]]), torch.ones(1, 1, dtype=state.dtype)


@contextmanager
def never_routed(model, blueprint: Blueprint, total: int):
    """Within the block, no router chooses an expert that the blueprint removes: its logit is minus infinity, and so is
    its correction bias, where it has one."""
    gone = {
        plan.host: [expert for expert in range(total) if expert not in plan.experts]
        for plan in blueprint.layers
        if plan.experts
    }
    current, linear = [0], torch.nn.functional.linear
    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: current.__setitem__(0, index))
        for index, layer in enumerate(decoder_of(model).layers)
    ]
    kept = {name: tensor.clone() for name, tensor in model.named_buffers() if "correction_bias" in name}
    for name, tensor in model.named_buffers():
        if name in kept:
            tensor[gone.get(int(name.split(".")[2]), [])] = -1e9

    def masked(hidden, weight, bias=None):
        output = linear(hidden, weight, bias)
        if weight.shape == (total, model.config.hidden_size):
            output[..., gone.get(current[0], [])] = -torch.inf
        return output

    torch.nn.functional.linear = masked
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        for hook in hooks:
            hook.remove()
        for name, tensor in kept.items():
            model.get_buffer(name).copy_(tensor)
