"""Importance in one forward-only calibration pass (Pangu Light 2505.20155, eq. 1-4), as sums that add over ranks."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.causal import CausalModel
from pipeline.model.families import family_of
from pipeline.model.forwards import replaced_forward
from pipeline.model.scores import Scores
from pipeline.prune.importance.experts import ExpertScore, ExpertSums, empty_sums, measure_experts, reap

AGGREGATIONS = ("sum", "minitron")
NORMS = ("all", "pre")


@dataclass
class Sums:
    """Partial sums of one pass, float64, on the CPU once collected; they add over batches and ranks.

    Memory: one number per norm and channel, head, neuron and layer, whatever the number of tokens.
    """

    aggregation: str
    channels: Tensor  # [norm, h], in the order of the layers, the final norm last
    heads: list[Tensor]  # per layer [n]
    neurons: list[Tensor]  # per layer [f]
    cosines: Tensor  # [layer]
    tokens: Tensor  # [1]
    experts: ExpertSums
    rows: int = 0  # sequences of the batch under way

    def tensors(self) -> list[Tensor]:
        """Return every sum, to be added over ranks in place."""
        return [self.channels, *self.heads, *self.neurons, self.cosines, self.tokens, *self.experts.tensors()]

    def scores(self, of_experts: ExpertScore = reap) -> Scores:
        """Return the finished scores, of experts by `of_experts`. Raise ValueError if no token was read."""
        count = int(self.tokens)
        if not count:
            raise ValueError("score.tokens: no calibration token was read; raise it")
        finish = torch.sqrt if self.aggregation == "minitron" else torch.clone
        return Scores(
            finish(self.channels).sum(0),
            tuple(map(finish, self.heads)),
            tuple(map(finish, self.neurons)),
            1.0 - self.cosines / count,
            count,
            experts=tuple(map(of_experts, self.experts.routing)),
            expert_neurons=tuple(self.experts.neurons),
            routing=tuple(self.experts.routing),
            shared=tuple(self.experts.shared) if any(map(len, self.experts.shared)) else (),
        )


@torch.no_grad()
def measure(
    model: nn.Module, anatomy: Anatomy, batches: Iterable[Tensor], aggregation: str = "sum", norms: str = "all"
) -> Sums:
    """Return the partial sums of eq. 1-4 over batches of token ids [batch, sequence].

    `model` maps ids to hidden states (the output matrix is not needed). aggregation `sum` adds absolute values over
    tokens; `minitron` takes the L2 norm over sequences of their mean over the sequence (2407.14679), of every norm by
    itself for channels, whose scores are then summed over norms. However sequences are grouped into batches and ranks,
    scores are the same. norms `all` scores channels at every norm over them, `pre` at pre-norms and the final norm
    only. Experts and the neurons of each are measured on the tokens that are routed to them, by sums whatever the
    aggregation is. Raise ValueError for another aggregation or other norms.
    """
    for setting, value, choices in (("aggregation", aggregation, AGGREGATIONS), ("norms", norms, NORMS)):
        if value not in choices:
            raise ValueError(f"score.{setting}: unknown value {value!r}; choose from {', '.join(choices)}")
    device = next(model.parameters()).device
    sizes, scored = anatomy.sizes, _scored_norms(anatomy, norms)

    def zeros(*lengths: int) -> Tensor:
        return torch.zeros(lengths, dtype=torch.float64, device="cpu" if device.type in ("npu", "mps") else device)

    sums = Sums(
        aggregation,
        zeros(len(scored), sizes.hidden),
        [zeros(w.heads) for w in sizes.layers],
        [zeros(w.neurons) for w in sizes.layers],
        zeros(len(sizes.layers)),
        zeros(1),
        empty_sums(anatomy, zeros),
    )
    with ExitStack() as hooks:
        _watch(model, anatomy, sums, scored, hooks)
        measure_experts(model, anatomy, sums.experts, hooks)
        for ids in batches:
            sums.tokens += ids.numel()
            sums.rows = len(ids)
            model(input_ids=ids.to(device), use_cache=False)
    for total in sums.tensors():
        total.data = total.cpu()
    return sums


def _scored_norms(anatomy: Anatomy, norms: str) -> list[str]:
    """Return the modules of the norms over hidden channels that are scored, the final one last."""
    family = anatomy.family
    post = family.post_norms if norms == "all" or not family.pre_norms else ()
    layers = range(len(anatomy.sizes.layers))
    inner = [name for layer in layers for name in anatomy.modules((*family.pre_norms, *post), layer)]
    return [*inner, family.final_norm]


def _watch(model: nn.Module, anatomy: Anatomy, sums: Sums, scored: list[str], hooks: ExitStack) -> None:
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    heads = partial(_heads, anatomy.sizes.head_size)
    writers: dict[str | None, Callable[..., None]] = {anatomy.writer("n d"): heads, anatomy.writer("f"): _neurons}
    for name, total in zip(scored, sums.channels):
        hooks.callback(modules[name].register_forward_hook(partial(_channels, sums, total)).remove)
    for layer in range(len(anatomy.sizes.layers)):
        for module, measured in writers.items():
            if module is not None and module.format(layer=layer) in modules:
                hook = partial(measured, sums, layer)
                hooks.callback(modules[module.format(layer=layer)].register_forward_pre_hook(hook).remove)
        block = modules[anatomy.family.prefix.format(layer=layer).rstrip(".")]
        hooks.callback(block.register_forward_hook(partial(_influence, sums, layer)).remove)


def _channels(sums: Sums, total: Tensor, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    by_sequence = output.reshape(sums.rows, -1, output.shape[-1])  # some classes put all tokens in one dimension
    _add(sums, total, by_sequence.abs())


def _heads(size: int, sums: Sums, layer: int, module: nn.Module, inputs: tuple) -> None:
    heads = inputs[0].unflatten(-1, (-1, size))  # [batch, sequence, n, d]
    _add(sums, sums.heads[layer], torch.linalg.vector_norm(heads, dim=-1, dtype=_sum_type(heads)))


def _neurons(sums: Sums, layer: int, module: nn.Module, inputs: tuple) -> None:
    _add(sums, sums.neurons[layer], inputs[0].abs())


def _influence(sums: Sums, layer: int, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
    output = output[0] if isinstance(output, tuple) else output
    before, after = (x.to(_sum_type(x)) for x in (inputs[0], output))
    norms = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
    cosine = (before * after).sum(-1) / norms.clamp(min=1e-12)  # [batch, sequence]
    sums.cosines[layer] += cosine.sum(dtype=torch.float64).to(sums.cosines.device)


def _add(sums: Sums, total: Tensor, values: Tensor) -> None:
    """Add absolute values [batch, sequence, width] to a sum [width]."""
    wide = _sum_type(values)
    if sums.aggregation == "sum":
        added = values.flatten(0, 1).sum(0, dtype=wide)  # several times faster on a CPU than a sum over two axes
    else:
        added = values.mean(1, dtype=wide).square().sum(0)
    total += added.to(total.device, torch.float64)


@torch.no_grad()
def inverse_rms(model: CausalModel, modules: Iterable[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return, for each norm module named as in the checkpoint, sums [2] over tokens: of 1/rms(input), and their count.

    Sums add over ranks; their quotient is s of post-RMSNorm absorption (Pangu Light), a mean of inverses.
    """
    device = next(model.parameters()).device
    named = dict(model.named_modules(prefix=family_of(model.config.model_type).decoder))
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in modules}

    def add(name: str, module: nn.Module, inputs: tuple) -> None:
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        inverse = torch.rsqrt(inputs[0].float().square().mean(-1) + epsilon)
        sums[name] += torch.tensor([float(inverse.sum(dtype=torch.float32)), inverse.numel()], dtype=torch.float64)

    with ExitStack() as hooks:
        for name in sums:
            hooks.callback(named[name].register_forward_pre_hook(partial(add, name)).remove)
        for ids in batches:
            model(input_ids=ids.to(device), use_cache=False)
    return sums


@contextmanager
def only_layers(model: CausalModel, total: int, kept: Collection[int]) -> Iterator[None]:
    """Bypass all layers of a causal model of `total` layers but `kept`, which keep their attention types.

    Within the context it is the model that `cut` makes of these hosts without donations.
    """

    family = family_of(model.config.model_type)

    def passing(hidden_states: Tensor, *rest, **named) -> Tensor | tuple[Tensor, Tensor | None]:
        return (hidden_states, named.get(str(family.passes_on))) if family.tuples else hidden_states

    with replaced_forward({layer_of(model, index): passing for index in set(range(total)) - set(kept)}):
        yield


def layer_of(model: CausalModel, index: int) -> nn.Module:
    """Return a layer of a causal model."""
    return model.get_submodule(family_of(model.config.model_type).prefix.format(layer=index).rstrip("."))


def _sum_type(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
