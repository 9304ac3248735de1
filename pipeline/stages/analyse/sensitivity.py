"""sensitivity: what narrowing one layer at a time costs, as the divergence from the whole model."""

import json
from pathlib import Path

import torch
from torch import Tensor

from pipeline.allocate.curves import removals
from pipeline.config import Config
from pipeline.evaluation.divergence import divergence, final_states
from pipeline.model.anatomy import LayerSizes
from pipeline.model.scores import Scores
from pipeline.prune.passes.prefix import PrefixCache
from pipeline.prune.plan import layers_that_stay, shuffled
from pipeline.prune.second_order.mask import masked, without
from pipeline.runtime.artifacts import write_atomically
from pipeline.runtime.checkpoint import load_model, open_checkpoint, open_tensors
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration, calibration_text
from pipeline.stages.stage import Inputs, Stage

FILE = "sensitivities.json"


def enabled(config: Config) -> bool:
    """Whether widths go by measured losses."""
    return config.plan.widths == "measured"


def settings(config: Config) -> dict:
    """Give the levels, which layers stay and what goes first where scores say it, what is restored, and the text."""
    policy = config.plan.policy
    restored = {"damping": config.restore.damping} if _restored(config) else {}
    return restored | {
        "levels": sorted(set(config.sensitivity.levels)),
        "kinds": _kinds(config),
        "depth": policy["depth"],
        "keep_first": policy["keep_first"],
        "drawn": policy["drawn"],
        "tokens": config.plan.depth_tokens,
        "length": config.sensitivity.length,
        "seed": config.seed,
    }


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write sensitivities.json: rows of a `layer`, the `kind` and number of units `removed` from it, and the `loss`.

    The loss is the mean KL in nats a token from the teacher's predictions to those of its layers that stay, one of them
    without its lowest-ranked groups or neurons and, unless `sensitivity.restored` is off, restored as `cut` would. The
    row of layer null is the loss with nothing removed. Memory: beside the model, the teacher's final states of the
    text and the stream before the layer that is narrowed, two rows [h] a token. Time: of a pass what lies above that
    layer.
    """
    device, ranks = machine.device, machine.ranks
    anatomy = open_checkpoint(inputs["subject"], config.model.allow_pickle).anatomy
    scores = Scores.load(inputs.get("obs_orders", inputs["scores"]) / "scores.safetensors")
    scores = shuffled(scores, config.plan.policy["drawn"], config.seed)
    kept = layers_that_stay(inputs, scores.layers, config.plan.policy)
    model = load_model(inputs["subject"], device.compute_dtype, device.attention, config.model.trust_remote_code)
    sequence = calibration_text(inputs).sequence
    length = min(config.sensitivity.length, sequence)
    whole = calibration(config, inputs, config.plan.depth_tokens // length * sequence, ranks)
    batches = [ids[:, :length] for ids in whole]
    grams = open_tensors(inputs["hessians"]) if _restored(config) else None
    wanted: list[Tensor] = []
    prefix = PrefixCache(model, len(anatomy.sizes.layers), batches)

    def loss(layer: int, groups: int, neurons: int) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        prefix.reach([index for index in kept if index < layer])
        with masked(model, anatomy, without(anatomy, scores, layer, groups, neurons), grams, config.restore.damping):
            for number, (ids, states) in enumerate(zip(batches, wanted, strict=True)):
                with prefix.rest(number, kept):
                    sums += divergence(model, ids, states, config.logits.chunk)
        ranks.sum_([sums])
        return float(sums[0] / sums[1])

    rows = ranks.share(_told(out / FILE) if ranks.rank == 0 else None)
    choices = [(None, None, 0)]
    for layer in kept:
        choices += [(layer, *choice) for choice in _choices(config, anatomy.sizes.layers[layer])]
    with placed(model, device, config.device.layer_streaming):
        wanted += [final_states(model, ids.to(device.torch)).cpu() for ids in batches]
        for layer, kind, removed in machine.progress(choices[len(rows) :], len(choices) - len(rows), "sensitivity"):
            gone = {"groups": 0, "neurons": 0} | ({kind: removed} if kind else {})
            value = loss(kept[0] if layer is None else layer, **gone)
            rows.append({"layer": layer, "kind": kind, "removed": removed, "loss": value})
            if ranks.rank == 0:
                write_atomically(out / FILE, json.dumps(rows))
    worst = max(rows, key=lambda row: row["loss"])
    machine.say(
        f"sensitivity: {len(rows) - 1} narrowings of one layer measured, KL {rows[0]['loss']:.4f} before and at most "
        f"{worst['loss']:.4f}, without {worst['removed']} {worst['kind']} of layer {worst['layer']}"
    )


def _restored(config: Config) -> bool:
    return config.restore.outputs and config.sensitivity.restored


def _kinds(config: Config) -> list[str]:
    """Give the kinds of units that may go: KV groups do not where the budget narrows the FFN alone."""
    return ["neurons"] if config.budget.axes == "neurons" else ["groups", "neurons"]


def _choices(config: Config, own: LayerSizes) -> list[tuple[str, int]]:
    """Give what is removed from a layer, one after another: the kind and how many; a KV group always stays."""
    levels = config.sensitivity.levels
    counts = {
        "groups": removals(own.groups, levels, own.groups - 1),
        "neurons": removals(own.neurons, levels, own.neurons),
    }
    return [(kind, count) for kind in _kinds(config) for count in counts[kind]]


def _told(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


STAGE = Stage(
    name="sensitivity",
    makes="sensitivities",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "scores", "shape"),
    optional=("obs_orders", "depth", "hessians"),
    enabled=enabled,
    resumable=True,  # every loss is written down as soon as it is measured
    shows={"sensitivities.json": "sensitivities.json"},
)
