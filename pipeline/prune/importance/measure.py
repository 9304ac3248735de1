"""Importance in one forward-only calibration pass (Pangu Light 2505.20155, eq. 1-4), as sums that add over ranks."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.families import FINAL_NORM, LAYER
from pipeline.model.scores import Scores

Batch = Tensor | tuple[Tensor, Tensor]  # token ids [batch, sequence], or with a mask of the tokens that count


@dataclass
class Sums:
    """Partial sums of one pass, float64, on the CPU once collected; they add over batches and ranks.

    Memory: one number a channel, head, neuron and layer, whatever the number of tokens.
    """

    aggregation: str
    channels: Tensor  # [h]
    heads: list[Tensor]  # per layer [n]
    neurons: list[Tensor]  # per layer [f]
    cosines: Tensor  # [layer]
    tokens: Tensor  # [1]
    mask: Tensor | None = field(default=None, repr=False)  # of the batch under way, [batch, sequence]

    def tensors(self) -> list[Tensor]:
        """Give every sum, to be added over ranks in place."""
        return [self.channels, *self.heads, *self.neurons, self.cosines, self.tokens]

    def scores(self) -> Scores:
        """Give the finished scores. ValueError if no token was seen."""
        count = int(self.tokens)
        if not count:
            raise ValueError("score.tokens: no calibration token was seen")
        finish = torch.sqrt if self.aggregation == "minitron" else torch.clone
        return Scores(
            finish(self.channels),
            tuple(map(finish, self.heads)),
            tuple(map(finish, self.neurons)),
            1.0 - self.cosines / count,
            count,
        )


@torch.no_grad()
def measure(
    model: nn.Module, anatomy: Anatomy, batches: Iterable[Batch], aggregation: str = "sum", norms: str = "all"
) -> Sums:
    """Give the partial sums of eq. 1-4 over batches of token ids [batch, sequence].

    `model` maps ids to hidden states (the output matrix is not needed). aggregation `sum` adds over tokens;
    `minitron` adds squares over the batch of the means over the sequence (L2 over batch, mean over sequence).
    norms `all` scores channels at every norm over them, `pre` at pre-norms and the final norm only.
    """
    place = next(model.parameters()).device
    sizes = anatomy.sizes

    def zeros(length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.float64, device="cpu" if place.type in ("npu", "mps") else place)

    sums = Sums(
        aggregation,
        zeros(sizes.hidden),
        [zeros(w.heads) for w in sizes.layers],
        [zeros(w.neurons) for w in sizes.layers],
        zeros(len(sizes.layers)),
        zeros(1),
    )
    with ExitStack() as hooks:
        _watch(model, anatomy, sums, norms, hooks)
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple) else (batch, None)
            sums.mask = None if mask is None else mask.to(place, torch.bool)
            sums.tokens += ids.numel() if mask is None else int(mask.sum())
            model(input_ids=ids.to(place), attention_mask=sums.mask, use_cache=False)
    for total in sums.tensors():
        total.data = total.cpu()
    return sums


def _watch(model: nn.Module, anatomy: Anatomy, sums: Sums, norms: str, hooks: ExitStack) -> None:
    modules = dict(model.named_modules(prefix="model"))
    family = anatomy.family
    scored = [*family.pre_norms, *(family.post_norms if norms == "all" or not family.pre_norms else ())]
    attention_out, ffn_out = anatomy.layer_module("h (n d)"), anatomy.layer_module("h f")
    final = modules[FINAL_NORM.removesuffix(".weight")]
    hooks.callback(final.register_forward_hook(partial(_channels, sums)).remove)
    for layer in range(len(anatomy.sizes.layers)):
        for norm in scored:
            module = modules[f"{LAYER}{norm}".format(layer=layer)]
            hooks.callback(module.register_forward_hook(partial(_channels, sums)).remove)
        into = modules[attention_out.format(layer=layer)]
        hooks.callback(into.register_forward_pre_hook(partial(_heads, sums, layer, anatomy.sizes.head_size)).remove)
        down = modules[ffn_out.format(layer=layer)]
        hooks.callback(down.register_forward_pre_hook(partial(_neurons, sums, layer)).remove)
        block = modules[f"model.layers.{layer}"]
        hooks.callback(block.register_forward_hook(partial(_influence, sums, layer)).remove)


def _channels(sums: Sums, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    _add(sums, sums.channels, output.abs())


def _heads(sums: Sums, layer: int, size: int, module: nn.Module, inputs: tuple) -> None:
    heads = inputs[0].unflatten(-1, (-1, size))  # [batch, sequence, n, d]
    _add(sums, sums.heads[layer], torch.linalg.vector_norm(heads, dim=-1, dtype=_sum_type(heads)))


def _neurons(sums: Sums, layer: int, module: nn.Module, inputs: tuple) -> None:
    _add(sums, sums.neurons[layer], inputs[0].abs())


def _influence(sums: Sums, layer: int, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
    output = output[0] if isinstance(output, tuple) else output
    before, after = (x.to(_sum_type(x)) for x in (inputs[0], output))
    norms = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
    cosine = (before * after).sum(-1) / norms.clamp(min=1e-12)  # [batch, sequence]
    if sums.mask is not None:
        cosine = cosine * sums.mask
    sums.cosines[layer] += cosine.sum(dtype=torch.float64).to(sums.cosines.device)


def _add(sums: Sums, total: Tensor, values: Tensor) -> None:
    """Add absolute values [batch, sequence, width] to a sum [width], tokens outside the mask left out."""
    wide = _sum_type(values)
    if sums.mask is not None:
        values = values * sums.mask.unsqueeze(-1)
    if sums.aggregation == "sum":
        added = values.flatten(0, 1).sum(0, dtype=wide)  # several times faster on a CPU than a sum over two axes
    else:
        count = values.shape[1] if sums.mask is None else sums.mask.sum(1, keepdim=True).clamp(min=1)
        added = (values.sum(1, dtype=wide) / count).square().sum(0)
    total += added.to(total.device, torch.float64)


@torch.no_grad()
def inverse_rms(model: nn.Module, modules: Iterable[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Give, for each norm module named as in the checkpoint, sums [2] over tokens: of 1/rms(input), and their count.

    Sums add over ranks; their quotient is s of post-RMSNorm absorption (Pangu Light), a mean of inverses.
    """
    place = next(model.parameters()).device
    named = dict(model.named_modules(prefix="model"))
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in modules}

    def add(name: str, module: nn.Module, inputs: tuple) -> None:
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        inverse = torch.rsqrt(inputs[0].float().square().mean(-1) + epsilon)
        sums[name] += torch.tensor([float(inverse.sum(dtype=torch.float32)), inverse.numel()], dtype=torch.float64)

    with ExitStack() as hooks:
        for name in sums:
            hooks.callback(named[name].register_forward_pre_hook(partial(add, name)).remove)
        for ids in batches:
            model(input_ids=ids.to(place), use_cache=False)
    return sums


@contextmanager
def only_layers(model: nn.Module, total: int, kept: Collection[int]) -> Iterator[None]:
    """Let a causal model of `total` layers pass the stream by all layers but `kept`, which keep their attention types.

    Inside it is the model that `cut` makes of these hosts without donations.
    """

    def passing(hidden_states: Tensor, *rest, **named) -> Tensor:
        return hidden_states

    with ExitStack() as undo:
        for index in set(range(total)) - set(kept):
            layer = layer_of(model, index)
            layer.forward = passing
            undo.callback(delattr, layer, "forward")
        yield


def layer_of(model: nn.Module, index: int) -> nn.Module:
    """Give a layer of a causal model."""
    return model.get_submodule(LAYER.format(layer=index).rstrip("."))


def _sum_type(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
