"""Layer gates: one learned scalar a layer, small for layers that the model can do without (TRSP 2505.18232, stage 1).

With LM the next-token loss and S_i the gate of layer i, LM + penalty * sum |S_i| is minimised over the gates alone. The
gate scales the residual branch, h <- h + S_i (F_i(h) - h), or, as in the paper, the stream, h <- S_i F_i(h), which
scales everything before the layer too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distill.next_token import LanguageHead, next_tokens


@dataclass(frozen=True)
class Learning:
    """How gates are learned (conf layer_gates)."""

    form: str  # residual | stream
    penalty: float
    learning_rate: float


def stream_of(arguments: tuple, named: dict[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """Return the residual stream [b, s, h] before and after a decoder layer, from the arguments of its hook."""
    return arguments[0] if arguments else named["hidden_states"], output[0] if isinstance(output, tuple) else output


@contextmanager
def gated(layers: Sequence[nn.Module], gates: Tensor, live: Iterable[int], form: str) -> Iterator[None]:
    """Within the block, scale the layers `live` by their gates [layer]; a gate of 1 changes no bit."""
    with ExitStack() as hooks:
        for layer in live:
            hook = partial(_gate, gates, layer, form)
            hooks.callback(layers[layer].register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _gate(gates: Tensor, layer: int, form: str, module: nn.Module, arguments: tuple, named: dict, output: Any) -> Any:
    before, after = stream_of(arguments, named, output)
    exact = torch.promote_types(after.dtype, gates.dtype)
    gate, wide = gates[layer].to(exact), after.to(exact)
    # Of the two ways to write it, lerp takes the one that is exact at 0 and at 1.
    scaled = torch.lerp(before.to(exact), wide, gate) if form == "residual" else gate * wide
    scaled = scaled.to(after.dtype)
    return (scaled, *output[1:]) if isinstance(output, tuple) else scaled


def objective(model: Any, head: LanguageHead, gates: Tensor, live: Sequence[int], tokens: Tensor, options: Learning):
    """Return the objective, differentiable by the gates [layer], and its next-token loss, over tokens [b, s]."""
    body = model.base_model
    with gated(body.layers, gates, live, options.form):
        states = body(input_ids=tokens, use_cache=False).last_hidden_state
    loss = head(states, next_tokens(tokens))
    return loss + options.penalty * gates[list(live)].abs().sum(), loss.detach()


def learn(
    model: Any,
    head: LanguageHead,
    start: Tensor,
    live: Sequence[int],
    batches: Iterable[tuple[Tensor, float]],
    options: Learning,
    add: Callable[[list[Tensor]], None],
) -> tuple[Tensor, float]:
    """Return the gates [layer] after one Adam step a batch, from `start`, and the mean next-token loss of the steps.

    The model's weights must be frozen. `batches`: this rank's rows [b, s] of each step with their share of the step's,
    0 where there is none; `add` replaces tensors by their sums over ranks, so that the gates are the same on each.
    """
    gates = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([gates], lr=options.learning_rate)
    total, steps = 0.0, 0
    for rows, share in batches:
        gates.grad = torch.zeros_like(gates)
        seen = torch.zeros((), dtype=gates.dtype, device=gates.device)
        if share:
            value, loss = objective(model, head, gates, live, rows.to(gates.device), options)
            (share * value).backward()
            seen += share * loss
        add([gates.grad, seen])
        optimizer.step()
        total, steps = total + float(seen), steps + 1
    return gates.detach(), total / steps


def ascending(gates: Tensor, layers: Iterable[int]) -> list[int]:
    """Return the layers in the order of their gates [layer], the one nearest to 0 first."""
    return sorted(layers, key=lambda layer: float(gates[layer].abs()))
