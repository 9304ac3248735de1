"""layer_loss: the layers that stay, by the measured loss of the model without the others, greedily or by evolution."""

from pathlib import Path

import torch

from pipeline.allocate.budgets import Loss, evolved_depth, greedy_depth
from pipeline.config import Config
from pipeline.evaluation.perplexity import tally
from pipeline.model.anatomy import Anatomy
from pipeline.model.scores import Scores
from pipeline.model.shape import Depth, Shape, Trial
from pipeline.prune.passes.prefix import PrefixCache
from pipeline.prune.plan import kept_layers
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage

LEDGER = "losses.jsonl"  # in the stage's folder until it is complete


def enabled(config: Config) -> bool:
    """Return whether layers are removed by measured loss."""
    return config.plan.depth in ("loss", "evolved")


def needs_also(config: Config) -> tuple[str, ...]:
    """Return what an evolution from the choice of block influence reads beside."""
    return ("scores",) if config.plan.depth == "evolved" and config.layer_loss.start == "influence" else ()


def settings(config: Config) -> dict:
    """Return the number of tokens, the layers that must stay, the batches, the seed that orders the text, and how sets
    of layers evolve where they do."""
    plan = config.plan
    return {
        "tokens": plan.depth_tokens,
        "keep_first": plan.keep_first,
        "seed": config.seed,
    } | ({"evolved": config.layer_loss.model_dump()} if plan.depth == "evolved" else {})


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write depth.json: the layers `kept`, their `loss` in nats per token, and every choice `tried` with its loss.

    Where all layers stay nothing is measured, and `loss` is null. Layers that a choice begins with as the one before it
    did are not run again; beside the model their streams are kept, one row [h] a token.
    """
    anatomy = checkpoint(config, inputs["subject"]).anatomy
    total = len(anatomy.sizes.layers)
    count = Shape.load(inputs["shape"]).layers
    whole = count == total
    found = Depth(tuple(range(total)), None, ()) if whole else _measured(config, inputs, out, anatomy, count, machine)
    if machine.ranks.rank == 0:
        found.save(out)
    if whole:
        machine.say("depth: all layers stay, nothing to measure")
    else:
        machine.say(f"depth: {len(found.tried)} choices of layers measured, loss {found.loss:.3f}")


def _measured(config: Config, inputs: Inputs, out: Path, anatomy: Anatomy, count: int, machine) -> Depth:
    device, ranks = machine.device, machine.ranks
    total, protected = len(anatomy.sizes.layers), anatomy.protected_layers(config.plan.keep_first)
    model = load(inputs["subject"], machine)
    options = config.plan
    batches = list(calibration(config, inputs, options.depth_tokens, ranks))
    ledger = Ledger(out / LEDGER, Trial, ranks)
    losses = {trial.kept: trial.loss for trial in ledger.entries}
    trials = max(0, _trials(config, len(protected), total, count) - len(losses))
    bar = machine.progress(range(trials), trials, "depth")
    prefix = PrefixCache(model, anatomy, batches)

    def loss(kept: tuple[int, ...]) -> float:
        if kept not in losses:
            prefix.reach_for(kept)
            sums = torch.zeros(3, dtype=torch.float64)
            for number, ids in enumerate(batches):
                with prefix.rest(number, kept):
                    sums += tally(model, [ids], config.logits.chunk)
            ranks.sum_([sums])
            losses[kept] = float(sums[0] / sums[2])
            ledger.append(Trial(kept, losses[kept]))
            next(bar, None)
        return losses[kept]

    with placed(model, device, config.device.layer_streaming):
        if needs_also(config):
            influence = Scores.load(inputs["scores"]).layers
            kept = tuple(kept_layers(influence, count, "influence", protected))
            found = Depth(kept, loss(kept), ())
        else:
            found = greedy_depth(total, count, loss, protected)
        if options.depth == "evolved":
            found = _evolved(config, found, protected, total, loss, machine)
    for _ in bar:  # sets that were measured before were not measured again
        pass
    ledger.discard()
    return found


def _evolved(config: Config, start: Depth, protected: frozenset[int], total: int, loss: Loss, machine) -> Depth:
    """Return the evolved choice, with all that was measured for either."""
    options = config.layer_loss
    found = evolved_depth(
        total, len(start.kept), loss, protected, start.kept, options.generations, options.offspring, config.seed
    )
    machine.say(f"depth: loss {start.loss:.3f} of the start ({options.start}), {found.loss:.3f} evolved")
    return Depth(found.kept, found.loss, tuple(dict.fromkeys((*start.tried, *found.tried))))


def _trials(config: Config, protected: int, total: int, count: int) -> int:
    """Return how many sets of layers are measured at most."""
    greedy = sum(left - protected for left in range(total, count, -1))
    if config.plan.depth == "loss":
        return greedy
    children = config.layer_loss.generations * config.layer_loss.offspring
    return children + (1 if config.layer_loss.start == "influence" else greedy)


STAGE = Stage(
    name="layer_loss",
    makes="depth",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "shape"),
    needs_also=needs_also,
    enabled=enabled,
    resumable=True,  # every loss is written down as soon as it is measured
    shows={"depth.json": Depth.FILE},
)
