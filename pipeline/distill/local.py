"""Local FFN distillation: one FFN at a time is trained to bring the student's stream to its teacher's (after Puzzle's
blockwise local distillation, 2411.19146), without a loss or a gradient beyond the FFN, so a step costs little.

In Puzzle a block reads its teacher's stream; here it reads the student's, whose earlier layers are trained already, and
so it also compensates for what they and the removed layers lack.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.distill.schedule import learning_rate

HELD_OUT = 16  # one token in so many is held out
BETAS = (0.9, 0.99)
WARMUP, FLOOR = 0.05, 0.01  # of the steps, of the rate
Add = Callable[[list[Tensor]], None]  # adds tensors over ranks, in place


@dataclass(frozen=True)
class Lessons:
    """How a module is trained: epochs, tokens a step over all ranks, learning rate; `seed` orders the tokens."""

    epochs: int
    batch: int
    rate: float  # of a matrix's root mean square
    seed: int
    precision: torch.dtype = torch.float32  # computed in; weights are float32
    kept: Mapping[str, torch.dtype] = field(default_factory=dict)  # other types that parameters are computed in


@dataclass(frozen=True)
class Rows:
    """This rank's tokens: streams that are read, added to and wanted, and their indices among those of all ranks."""

    read: Tensor  # [tokens, h]
    base: Tensor  # [tokens, h]
    wanted: Tensor  # [tokens, h]
    places: Tensor  # [tokens], int64
    total: int  # of all ranks


@dataclass(frozen=True)
class Learnt:
    """The squared distance from the target stream over its square, a mean over held-out tokens, before and after.

    They are equal where training did not help.
    """

    before: float
    after: float


def is_matrix(name: str, weight: Tensor) -> bool:
    """Return whether a parameter is trained: one of two dimensions or more, but no bias of several experts."""
    return weight.dim() > 1 and not name.endswith("bias")


def learn(module: nn.Module, rows: Rows, lessons: Lessons, add: Add) -> Learnt:
    """Train the matrices of a module of float32 weights so that base + module(read) equals the wanted stream.

    The loss is the mean over tokens of the squared distance over the square of the target stream: the next layer reads
    it after a norm, and a plain distance would depend on the few tokens with massive activations alone. Adam's learning
    rate of a matrix is a fraction of its root mean square, so that one setting suits models of any scale; it falls
    along a cosine. The tokens of a step do not depend on the number of ranks: each rank uses its own, and gradients are
    added. Where the distance on held-out tokens does not fall, the weights are restored.
    """
    for name, weight in module.named_parameters():
        weight.requires_grad_(is_matrix(name, weight))
    matrices = [weight for weight in module.parameters() if weight.requires_grad]
    origin = [weight.detach().clone() for weight in matrices]
    before = _measured(module, rows, lessons, add)
    seen = torch.arange(rows.total)[torch.arange(rows.total) % HELD_OUT != HELD_OUT - 1]
    steps = lessons.epochs * -(-len(seen) // lessons.batch)
    peaks = [lessons.rate * float(weight.detach().square().mean().sqrt()) for weight in matrices]
    groups = [{"params": [weight], "lr": peak} for weight, peak in zip(matrices, peaks, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    for step, (chosen, count) in enumerate(_chosen(rows, seen, lessons)):
        share = learning_rate("cosine", step, steps, 1.0, WARMUP, FLOOR)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak
        optimizer.zero_grad()
        with torch.enable_grad():
            distances = _distances(module, rows, chosen, lessons)
            if distances.requires_grad:
                (distances / count).backward()
        add([_gradient(weight) for weight in matrices])
        optimizer.step()
    for weight in matrices:
        weight.grad = None
    after = _measured(module, rows, lessons, add)
    if after < before:
        return Learnt(before, after)
    with torch.no_grad():
        for weight, old in zip(matrices, origin, strict=True):
            weight.copy_(old)
    return Learnt(before, before)


def _chosen(rows: Rows, seen: Tensor, lessons: Lessons) -> Iterator[tuple[Tensor, int]]:
    """Yield for each step this rank's rows of a batch, and the tokens of the batch over all ranks.

    The rows of an epoch are moved to the device at once: a copy a step would make the host wait for every step.
    """
    draw = torch.Generator().manual_seed(lessons.seed)
    own = torch.full((rows.total,), -1)
    own[rows.places] = torch.arange(len(rows.places))
    for _ in range(lessons.epochs):
        batches = seen[torch.randperm(len(seen), generator=draw)].split(lessons.batch)
        mine = [here[here >= 0] for here in (own[batch] for batch in batches)]
        placed = torch.cat(mine).to(rows.read.device).split([len(each) for each in mine])
        yield from zip(placed, map(len, batches), strict=True)


@torch.no_grad()
def _measured(module: nn.Module, rows: Rows, lessons: Lessons, add: Add) -> float:
    """Return the mean distance of held-out tokens."""
    held = (rows.places % HELD_OUT == HELD_OUT - 1).nonzero().flatten().to(rows.read.device)
    sums = torch.zeros(2, dtype=torch.float64)
    for part in held.split(lessons.batch):
        sums += torch.tensor([float(_distances(module, rows, part, lessons)), len(part)], dtype=torch.float64)
    add([sums])
    return float(sums[0] / sums[1])


def _distances(module: nn.Module, rows: Rows, chosen: Tensor, lessons: Lessons) -> Tensor:
    """Return the sum over tokens of |base + module(read) - wanted|² / |wanted|²."""
    read, base, wanted = rows.read[chosen], rows.base[chosen], rows.wanted[chosen].float()
    if not len(chosen):
        return wanted.new_zeros(())
    types = lessons.kept
    weights = {name: weight.to(types.get(name, lessons.precision)) for name, weight in module.named_parameters()}
    added = functional_call(module, weights, (read.to(lessons.precision),))
    squares = wanted.square().sum(-1).clamp_min(torch.finfo(wanted.dtype).tiny)
    return ((base.float() + added.float() - wanted).square().sum(-1) / squares).sum()


def _gradient(weight: Tensor) -> Tensor:
    """Return the gradient of a weight: zero on a rank without a token of the step, and of one that no token used."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
