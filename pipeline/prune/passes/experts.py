"""A pass that runs the experts of a mixture one after another, and shows what each computes."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.forwards import replaced_forward

# (expert, its neurons [t, x], its output [t, h], the router's weights [t]) of the tokens that are sent to it; weights
# are 1 where the class multiplies an expert's input by them
Seen = Callable[[int, Tensor, Tensor, Tensor], None]


def watch_experts(model: nn.Module, anatomy: Anatomy, seen: Mapping[int, Seen], undo: ExitStack) -> None:
    """Show what the experts of some layers of a model compute, until `undo`; `seen` is by layer.

    The fused modules of these experts run one expert after another on the tokens that are routed to it: the output of
    each is needed, and float64 has no other implementation. No weights are copied.
    """
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    places = {layer: modules[anatomy.expert_module(layer)] for layer in seen}
    count = anatomy.sizes.carried["e"] if seen else 0
    forward = _forward_scaled if anatomy.family.scaled_inputs else _forward
    undo.enter_context(
        replaced_forward({places[layer]: partial(forward, places[layer], count, seen[layer]) for layer in seen})
    )


def expert_output(module: Any, expert: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the neurons [t, x] and the output [t, h] of one expert of a fused module for states [t, h].

    Modules that transformers computes in one way only, such as Llama 4's, do not state their layout: [in, out], the
    gates before the other neurons, no biases.
    """
    both = _product(module, "gate_up_proj", expert, states)
    if hasattr(module, "_apply_gate"):
        neurons = module._apply_gate(both)
    else:
        gates, values = both.chunk(2, dim=-1)
        neurons = values * module.act_fn(gates)
    return neurons, _product(module, "down_proj", expert, neurons)


def _product(module: Any, name: str, expert: int, values: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    result = values @ (weight if getattr(module, "is_transposed", True) else weight.T)
    return result + getattr(module, f"{name}_bias")[expert] if getattr(module, "has_bias", False) else result


def _forward(module: nn.Module, count: int, seen: Seen, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return what a module of experts returns for states [t, h], the chosen experts [t, k] and their weights [t, k]."""
    output = torch.zeros_like(states)
    for expert in range(count):
        token, place = torch.where(chosen == expert)
        if not len(token):
            continue
        inner, values = expert_output(module, expert, states[token])
        weight = weights[token, place]
        output.index_add_(0, token, (values * weight[:, None]).to(output.dtype))
        seen(expert, inner, values, weight)
    return output


def _forward_scaled(module: nn.Module, count: int, seen: Seen, states: Tensor) -> Tensor:
    """Return what a module of experts returns for the scaled states [e t, h] of all tokens, those of one expert after
    those of another; they are zero for an expert that a token is not sent to."""
    output = torch.zeros_like(states)
    parts = zip(states.unflatten(0, (count, -1)), output.unflatten(0, (count, -1)), strict=True)
    for expert, (own, written) in enumerate(parts):
        sent = own.any(-1)
        if not sent.any():
            continue
        inner, values = expert_output(module, expert, own[sent])
        written[sent] = values
        seen(expert, inner, values, values.new_ones(len(values)))
    return output
