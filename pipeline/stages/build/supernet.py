"""supernet: the width of every W_O and W_down, found by evolution among candidates in rounds (Týr-the-Pruner)."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.allocate.evolution import Choice
from pipeline.allocate.sites import even_start, given_start, sites_of
from pipeline.config import Config
from pipeline.model.scores import Scores
from pipeline.model.shape import Shape, Widths
from pipeline.prune.plan import layers_that_stay
from pipeline.prune.second_order.hessian import need_projections, projections
from pipeline.prune.second_order.narrow import Narrowed
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.disk import need_space
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.supernet_search import Bench, composed, search_round, selection_loss, solved_again

WORK = "work"  # in the stage's folder until it is complete
FACTS = "supernet.json"


def enabled(config: Config) -> bool:
    """Return whether widths are found by evolution."""
    return config.plan.widths == "evolved"


def check(config: Config) -> None:
    """Refuse selections that do not narrow down to one child on more and more text."""
    tokens, survivors = config.supernet.tokens, config.supernet.survivors
    if len(tokens) != len(survivors) or tokens != sorted(tokens):
        raise ValueError(f"supernet.tokens: {tokens}; set as many as survivors {survivors}, in ascending order")
    if survivors[-1] != 1 or survivors != sorted(survivors, reverse=True):
        raise ValueError(f"supernet.survivors: {survivors}; set them in descending order, the last one 1")


def settings(config: Config) -> dict[str, Any]:
    """Return the supernet section, how units are ranked and solved, on which text, and which layers stay."""
    return {
        "supernet": config.supernet.model_dump(),
        "restore": config.restore.model_dump(include={"local", "at_once", "damping", "tokens"}),
        "depth": config.plan.policy["depth"],
        "keep_first": config.plan.keep_first,
        "seed": config.seed,
    }


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the subject with W_O and W_down solved for the widths found, the columns of removed units zero.

    Beside it scores by which plan keeps exactly these units, widths.json, and supernet.json with the results of each
    round. Disk: at most two supernets, with a W_O or W_down for each candidate, and the final states of the selection
    text. Raise ValueError if the budget is out of reach.
    """
    section, ranks = config.supernet, machine.ranks
    source = checkpoint(config, inputs["subject"])
    need_projections(source.anatomy, "plan.widths=evolved", "plan.widths=uniform")
    need_space(out, source.bytes() * (2 + 2 * section.steps))
    scores, shape = Scores.load(inputs["scores"]), Shape.load(inputs["shape"])
    kept = layers_that_stay(inputs, source.anatomy, scores.layers, config.plan.policy)
    sites = sites_of(source.anatomy.sizes, kept, projections(source.anatomy), section.multiple)
    start = given_start(sites, shape) if shape.weights is None else even_start(sites, shape.weights)
    model = load(inputs["subject"], machine)
    batches = calibration(config, inputs, config.restore.tokens, ranks)
    bench = Bench(
        config, machine, out / WORK, source, kept, {site.name: site for site in sites}, model, batches, present={}
    )
    loss = selection_loss(bench)
    widths, rounds = start, []
    for number in range(section.rounds):
        generations = search_round(bench, number, widths, loss)
        first, last = generations[0], generations[-1]
        machine.say(f"supernet: round {number + 1} of {section.rounds}, KL {first.loss:.4f} to {last.loss:.4f}")
        widths = last.widths
        rounds.append({"widths": widths, "losses": [each.loss for each in generations]})
    losses = {"composed": last.loss}
    solved: dict[str, Callable[[], Mapping[str, Narrowed]]] = {"composed": lambda: composed(bench, widths)}
    if section.weights != "composed":
        again = solved_again(bench, widths)
        solved["solved_again"] = lambda: again
        with placed(model, machine.device, config.device.layer_streaming):
            losses["solved_again"] = loss(len(section.tokens) - 1)
    taken = min(losses, key=lambda way: losses[way]) if section.weights == "better" else section.weights
    if ranks.rank == 0:
        _write(bench, inputs["subject"], out, solved[taken](), scores, widths)
        facts = {"sites": list(bench.sites), "start": start, "rounds": rounds, "losses": losses, "taken": taken}
        (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(out / WORK, ignore_errors=True)  # NFS keeps a hidden file for what is still mapped
    machine.say(
        f"supernet: KL {rounds[0]['losses'][0]:.4f} of even widths, {losses[taken]:.4f} of those found, weights {taken}"
    )


def _write(
    bench: Bench, subject: Path, out: Path, solved: Mapping[str, Narrowed], scores: Scores, widths: Choice
) -> None:
    """Write the model folder with these projections, the ranks of their units as scores, and its layers' widths."""
    source, heads, neurons = bench.source, list(scores.heads), list(scores.neurons)
    sizes = list(source.anatomy.sizes.layers)
    for site, width in zip(bench.sites.values(), widths, strict=True):
        layer, ranked = sizes[site.layer], solved[site.name].scores
        if site.kind == "ffn":
            neurons[site.layer], sizes[site.layer] = ranked, replace(layer, neurons=width)
        else:
            each = layer.heads // layer.groups
            heads[site.layer] = ranked.repeat_interleave(each)
            sizes[site.layer] = replace(layer, heads=width * each, groups=width)
    changed = {f"{name}.weight": each.weight for name, each in solved.items()}
    stream = (
        (name, changed[name].to("cpu", source[name].dtype) if name in changed else source[name]) for name in source
    )
    write_checkpoint(out, source.config, stream, bench.config.checkpoint.shard_bytes, subject)
    scores.with_units(heads, neurons).save(out)
    Widths(tuple(sizes)).save(out)


STAGE = Stage(
    name="supernet",
    makes="restored",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "scores", "shape"),
    optional=("depth",),
    becomes=("subject",),
    enabled=enabled,
    check=check,
    resumable=True,  # every generation is on disk
    shows={"restored": "", FACTS: FACTS},
)
