"""layer_gates: the layers that stay, by trained gates: the smallest is removed, the rest are trained again (TRSP)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import stream
from pipeline.distill.gates import Learning, ascending, learn
from pipeline.distill.next_token import LanguageHead
from pipeline.evaluation.perplexity import tally
from pipeline.model.anatomy import Anatomy
from pipeline.model.shape import Depth, Shape, Trial, check_depth
from pipeline.prune.importance.measure import only_layers
from pipeline.prune.passes.prefix import PrefixCache
from pipeline.runtime.layer_streaming import need_memory
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import Ranks
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage

LEDGER = "rounds.jsonl"


@dataclass(frozen=True)
class Round:
    """A layer that was picked: the gates, the mean loss while they were trained, and the losses without a layer.

    Losses are those of each layer that was considered: the picked one, or all with `layer_gates.guard`.
    """

    picked: int
    loss: float
    gates: tuple[float, ...]
    losses: tuple[tuple[int, float], ...]


def enabled(config: Config) -> bool:
    """Return whether layers are removed by trained gates."""
    return config.plan.depth == "gates"


def check(config: Config) -> None:
    """Refuse a text that is shorter than a step, before any work."""
    if enabled(config):
        _steps(config)


def settings(config: Config) -> dict:
    """Return how gates are trained, the layers that must stay, the tokens that losses are measured on, and the seed."""
    measured = {"keep_first": config.plan.keep_first, "depth_tokens": config.plan.depth_tokens}
    return config.layer_gates.model_dump() | measured | {"seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write depth.json, and rounds.jsonl with a `Round` a line."""
    device, ranks, options = machine.device, machine.ranks, config.layer_gates
    anatomy = checkpoint(config, inputs["subject"]).anatomy
    total = len(anatomy.sizes.layers)
    count = Shape.load(inputs["shape"]).layers
    protected = anatomy.protected_layers(config.plan.keep_first)
    check_depth(count, total, protected)
    weights = anatomy.parameters()[0] * device.compute_dtype.itemsize
    need_memory(device, {"weights": weights}, "plan.depth=gates", "set plan.depth=influence, loss or evolved")
    model = load(inputs["subject"], machine).to(device.torch).requires_grad_(False)
    head = LanguageHead(model, config.logits.chunk)
    learning = Learning(options.form, options.penalty, options.learning_rate)
    steps, measured = _steps(config), calibration(config, inputs, config.plan.depth_tokens, ranks)
    loss = _loss(config, model, anatomy, list(measured), ranks)
    ledger = Ledger(out / LEDGER, Round, ranks)
    kept = [layer for layer in range(total) if layer not in {each.picked for each in ledger.entries}]
    bar = iter(machine.progress(range(len(kept) - count), len(kept) - count, "layer gates"))
    while len(kept) > count:
        batches = islice(
            _batches(config, measured.packed, len(ledger.entries) * steps * options.batch_size, ranks), steps
        )
        with only_layers(model, total, kept):
            gates, learnt = learn(model, head, _ones(total, model), kept, batches, learning, ranks.sum_)
        order = ascending(gates, [layer for layer in kept if layer not in protected])
        losses = _losses(order, options.guard, lambda layer: loss([each for each in kept if each != layer]))
        picked = pick(losses, options.guard)
        passed_over = list(losses)[: list(losses).index(picked)]
        kept.remove(picked)
        ledger.append(Round(picked, learnt, tuple(gates.tolist()), tuple(losses.items())))
        machine.say(
            f"layer_gates: layer {picked} is removed, its gate {float(gates[picked]):.4f}; loss without it "
            f"{losses[picked]:.3f}" + (f"; smaller gates that lose too much: {passed_over}" if passed_over else "")
        )
        next(bar, None)
    if ranks.rank == 0:
        _depth(total, kept, ledger.entries).save(out)


def pick(losses: Mapping[int, float], guard: float | None) -> int:
    """Return the first layer, in the order of their gates, whose loss is at most `guard` times the least of all."""
    limit = torch.inf if guard is None else guard * min(losses.values())
    return next(layer for layer, loss in losses.items() if loss <= limit)


def _losses(order: Sequence[int], guard: float | None, loss: Callable[[int], float]) -> dict[int, float]:
    """Return losses without a layer, by layer in the order of their gates; without a guard only that of the first."""
    if guard is None:
        return {order[0]: loss(order[0])}
    measured = {layer: loss(layer) for layer in sorted(order)}  # so that a pass starts where the one before did
    return {layer: measured[layer] for layer in order}


def _depth(total: int, kept: list[int], rounds: list[Round]) -> Depth:
    """Return the layers that stay, and the sets of layers of every round with their loss."""
    tried, left = [], list(range(total))
    for each in rounds:
        left.remove(each.picked)
        tried.append(Trial(tuple(left), dict(each.losses)[each.picked]))
    return Depth(tuple(kept), tried[-1].loss if tried else None, tuple(tried))


def _ones(total: int, model: torch.nn.Module) -> Tensor:
    """Return gates [layer] that change nothing: for every choice they are trained on the current model."""
    like = next(model.parameters())
    return torch.ones(total, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _batches(config: Config, text: Packed, start: int, ranks: Ranks) -> Iterator[tuple[Tensor, float]]:
    """Yield this rank's rows of every step and their share of its `layer_gates.batch_size` rows."""
    for batch in stream(text, config.layer_gates.batch_size, 0, 1, start, config.seed):
        rows = batch[ranks.rank :: ranks.world]
        yield rows, len(rows) / len(batch)


def _loss(
    config: Config, model: torch.nn.Module, anatomy: Anatomy, batches: Sequence[Tensor], ranks: Ranks
) -> Callable[[Sequence[int]], float]:
    """Return the function from layers to the loss, in nats per token, of the model of these layers alone."""
    prefix = PrefixCache(model, anatomy, batches)

    def loss(layers: Sequence[int]) -> float:
        sums = torch.zeros(3, dtype=torch.float64)
        prefix.reach_for(layers)
        for number, ids in enumerate(batches):
            with prefix.rest(number, layers):
                sums += tally(model, [ids], config.logits.chunk)
        ranks.sum_([sums])
        return float(sums[0] / sums[2])

    return loss


def _steps(config: Config) -> int:
    options, sequence = config.layer_gates, config.data.sequence_length
    per_step = options.batch_size * sequence
    if options.tokens < per_step:
        raise ValueError(
            f"layer_gates.tokens is {options.tokens}, less than one step of layer_gates.batch_size "
            f"({options.batch_size}) x data.sequence_length ({sequence}) = {per_step} tokens; raise it, or lower the "
            "batch size"
        )
    return options.tokens // per_step


STAGE = Stage(
    name="layer_gates",
    makes="depth",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "shape"),
    enabled=enabled,
    check=check,
    resumable=True,  # a later attempt continues after the last layer picked
    revision=2,
    shows={"depth.json": Depth.FILE},
)
