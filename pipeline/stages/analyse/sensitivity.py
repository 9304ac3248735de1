"""sensitivity: the divergence from the subject's predictions when one layer at a time is narrowed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.allocate.curves import Kind, Narrowing, Sensitivities, removals
from pipeline.config import Config
from pipeline.evaluation.divergence import divergence, final_states
from pipeline.model.scores import Scores
from pipeline.model.sizes import LayerSizes
from pipeline.prune.passes.prefix import PrefixCache
from pipeline.prune.plan import layers_that_stay, shuffled
from pipeline.prune.second_order.mask import masked, without
from pipeline.runtime.checkpoint import open_tensors
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration, calibration_text
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage

LEDGER = "measured.jsonl"  # in the stage's folder until it is complete


def enabled(config: Config) -> bool:
    """Return whether widths are chosen by measured losses."""
    return config.plan.widths == "measured"


def settings(config: Config) -> dict[str, Any]:
    """Return the levels, which layers stay and what is removed first, what is restored, and the text."""
    policy = config.plan.policy
    return {
        "levels": sorted(set(config.sensitivity.levels)),
        "kinds": _kinds(config),
        "depth": policy["depth"],
        "keep_first": policy["keep_first"],
        "drawn": policy["drawn"],
        "tokens": config.plan.depth_tokens,
        "length": config.sensitivity.length,
        "damping": config.restore.damping if _restores(config) else None,
        "seed": config.seed,
    }


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write sensitivities.json: the loss of every narrowing of one layer.

    The loss is the mean KL in nats per token from the predictions of the whole subject to those of its layers that
    stay, one of them without its lowest-ranked groups or neurons and, with `sensitivity.restored`, restored as `cut`
    would. Memory: the model, the final hidden states of the text and the residual stream before the narrowed layer,
    two rows [h] per token. Time: of each pass the layers from the narrowed one upwards.
    """
    ranks, device = machine.ranks, machine.device.torch
    anatomy = checkpoint(config, inputs["subject"]).anatomy
    scores = Scores.load(inputs.get("obs_orders", inputs["scores"]))
    scores = shuffled(scores, config.plan.policy["drawn"], config.seed)
    kept = layers_that_stay(inputs, anatomy, scores.layers, config.plan.policy)
    model = load(inputs["subject"], machine)
    sequence = calibration_text(inputs).sequence
    length = min(config.sensitivity.length, sequence)
    whole = calibration(config, inputs, config.plan.depth_tokens // length * sequence, ranks)
    batches = [ids[:, :length] for ids in whole]
    restored: dict[str, Any] = {}
    if _restores(config):
        restored = {"grams": open_tensors(inputs["hessians"]), "damping": config.restore.damping}
    prefix = PrefixCache(model, anatomy, batches)
    targets: list[Tensor] = []

    def loss(layer: int, groups: int, neurons: int) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        prefix.reach([index for index in kept if index < layer])
        with masked(model, anatomy, without(anatomy, scores, layer, groups, neurons), **restored):
            for number, (ids, states) in enumerate(zip(batches, targets, strict=True)):
                with prefix.rest(number, kept):
                    sums += divergence(model, ids, states, config.logits.chunk)
        ranks.sum_([sums])
        return float(sums[0] / sums[1])

    ledger = Ledger(out / LEDGER, Narrowing, ranks)
    choices: list[tuple[int | None, Kind | None, int]] = [(None, None, 0)]
    for index in kept:
        choices += [(index, *choice) for choice in _choices(config, anatomy.sizes.layers[index])]
    left = choices[len(ledger.entries) :]
    with placed(model, machine.device, config.device.layer_streaming):
        targets += [final_states(model, ids.to(device)).cpu() for ids in batches]
        for layer, kind, removed in machine.progress(left, len(left), "sensitivity"):
            groups, neurons = (removed if kind == each else 0 for each in ("groups", "neurons"))
            measured = loss(kept[0] if layer is None else layer, groups, neurons)
            ledger.append(Narrowing(layer, kind, removed, measured))
    if ranks.rank == 0:
        Sensitivities(tuple(ledger.entries)).save(out)
    ledger.discard()
    first, *rows = ledger.entries
    worst = max(rows, key=lambda row: row.loss)
    machine.say(
        f"sensitivity: {len(rows)} narrowings of one layer measured; KL {first.loss:.4f} with nothing removed, at most "
        f"{worst.loss:.4f}, without {worst.removed} {worst.kind} of layer {worst.layer}"
    )


def _restores(config: Config) -> bool:
    """Return whether the units that stay in the narrowed layer are solved again."""
    return config.restore.outputs and config.sensitivity.restored


def _kinds(config: Config) -> list[Kind]:
    """Return the kinds of units that may be removed: no KV groups where the budget narrows the FFN alone."""
    return ["neurons"] if config.budget.axes == "neurons" else ["groups", "neurons"]


def _choices(config: Config, own: LayerSizes) -> list[tuple[Kind, int]]:
    """Return what is removed from a layer, in order: the kind and the number of units; one KV group always stays."""
    levels = config.sensitivity.levels
    counts = {
        "groups": removals(own.groups, levels, own.groups - 1),
        "neurons": removals(own.neurons, levels, own.neurons),
    }
    return [(kind, count) for kind in _kinds(config) for count in counts[kind]]


STAGE = Stage(
    name="sensitivity",
    makes="sensitivities",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "scores", "shape"),
    optional=("obs_orders", "depth", "hessians"),
    enabled=enabled,
    resumable=True,  # every loss is on disk as soon as it is measured
    shows={"sensitivities.json": Sensitivities.FILE},
)
