"""sublayers: the attentions and FFNs of single layers to remove, one after another, by measured KL."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.allocate.sublayers import Part, Removed, greedy_sublayers
from pipeline.config import Config
from pipeline.evaluation.divergence import divergence, final_states
from pipeline.model.scores import Scores
from pipeline.model.shape import MeasuredRemoval, Sublayers
from pipeline.prune.passes.prefix import PrefixCache
from pipeline.prune.passes.sublayers import without_sublayers
from pipeline.prune.plan import layers_that_stay
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.sublayer_target import Target, target_of

LEDGER = "measured.jsonl"  # in the stage's folder until it is complete


def enabled(config: Config) -> bool:
    """Return whether attentions or FFNs of single layers are removed."""
    return config.removes_sublayers


def check(config: Config) -> None:
    """Refuse numbers and sizes that no student has, where the teacher is a folder."""
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder is None or not enabled(config) or (config.stages is not None and "sublayers" not in config.stages):
        return
    anatomy = open_checkpoint(folder, config.model.allow_pickle).anatomy
    target_of(config, anatomy, range(config.shape.layers or len(anatomy.sizes.layers))).check()


def settings(config: Config) -> dict[str, Any]:
    """Return the sublayers section, which layers stay, and the text; the shape names what is requested."""
    policy = config.plan.policy
    return config.sublayers.model_dump() | {
        "depth": policy["depth"],
        "keep_first": policy["keep_first"],
        "tokens": config.plan.depth_tokens,
        "seed": config.seed,
        "size": _requested(config),
    }


def _requested(config: Config) -> dict[str, Any]:
    """Return the requested numbers, or what determines the size."""
    if config.shape.sublayers:
        return dict(config.shape.sublayers)
    budget = config.budget
    dtype = config.export.dtype if budget.bytes else None
    sized = budget.sized or {"parameters": budget.fallback}
    return sized | {
        "context": budget.context,
        "dtype": dtype,
        "rotate": config.rotate.model_dump(include={"kind", "tie"}),
    }


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write sublayers.json: the sub-layers that are removed, in order, each with the KL divergence then.

    The divergence is the mean KL in nats per token from the predictions of the whole subject. Memory: the model, the
    final hidden states of the text and one residual stream. Time: of each pass the layers from the removed one upwards.
    """
    anatomy = checkpoint(config, inputs["subject"]).anatomy
    hosts = layers_that_stay(inputs, anatomy, Scores.load(inputs["scores"]).layers, config.plan.policy)
    target = target_of(config, checkpoint(config, inputs["teacher"]).anatomy, hosts)
    target.check()
    ranks, device = machine.ranks, machine.device.torch
    model = load(inputs["subject"], machine)
    batches = list(calibration(config, inputs, config.plan.depth_tokens, ranks))
    prefix = PrefixCache(model, anatomy, batches)
    ledger = Ledger(out / LEDGER, MeasuredRemoval, ranks)
    known = {frozenset(entry.removed): entry.divergence for entry in ledger.entries}
    targets: list[Tensor] = []
    complete: list[bool] = []
    bar = machine.progress(iter(lambda: bool(complete), True), None, "sublayers")
    streams: Removed = ()  # what those of the prefix are without

    def measured(removed: Removed, part: Part | None) -> float:
        nonlocal streams
        gone = removed if part is None else (*removed, part)
        key = frozenset(gone)
        if key not in known:
            sums = torch.zeros(2, dtype=torch.float64)
            layers = target.hosts_without(gone)
            if removed != streams:
                prefix.reach([])
                streams = removed
            with without_sublayers(model, anatomy, removed):
                prefix.reach([layer for layer in layers[:-1] if part is not None and layer < part[0]])
                with without_sublayers(model, anatomy, () if part is None else (part,)):
                    for number, (ids, states) in enumerate(zip(batches, targets, strict=True)):
                        with prefix.rest(number, layers):
                            sums += divergence(model, ids, states, config.logits.chunk)
            ranks.sum_([sums])
            known[key] = float(sums[0] / sums[1])
            ledger.append(MeasuredRemoval(tuple(sorted(gone)), known[key]))
            next(bar, None)
        return known[key]

    with placed(model, machine.device, config.device.layer_streaming):
        targets += [final_states(model, ids.to(device)).cpu() for ids in batches]
        found = greedy_sublayers(
            target.parts,
            measured,
            allowed=target.allows,
            enough=target.enough,
            size=target.size if config.sublayers.score == "kl_per_size" and target.limit else None,
            candidates=config.sublayers.candidates,
        )
    complete.append(True)
    next(bar, None)
    result = Sublayers(tuple(hosts), tuple(found))
    if ranks.rank == 0:
        result.save(out)
    ledger.discard()
    machine.say(f"sublayers: {len(known)} models measured; {_words(result, target)}")


def _words(result: Sublayers, target: Target) -> str:
    """Return what is removed, as text."""
    lost = [sum(each.sublayer == axis for each in result.removed) for axis in ("attention_layers", "ffn_layers")]
    text = f"{lost[0]} attentions and {lost[1]} FFNs removed"
    if result.removed:
        text += f", KL {result.removed[-1].divergence:.4f}"
    if target.limit is None:
        return text
    reached = target.limit.shown(target.size(tuple((each.layer, each.sublayer) for each in result.removed)))
    return f"{text}; budget.{target.limit.name}: {target.limit.requested:g} requested, {reached} reached"


STAGE = Stage(
    name="sublayers",
    makes="sublayers",
    run=run,
    settings=settings,
    needs=("subject", "teacher", "tokens", "scores", "shape"),
    optional=("depth",),
    enabled=enabled,
    check=check,
    resumable=True,  # every divergence is on disk as soon as it is measured
    shows={"sublayers.json": Sublayers.FILE},
)
