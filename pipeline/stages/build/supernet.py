"""supernet: widths of every W_O and W_down found by evolution among candidates, in finer and finer rounds (Týr).

A round builds the supernet from the dense weights around the widths that the last one found, then searches it. What it
has found is on disk after every generation: an interrupted search goes on where it was.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.allocate.evolution import Generation, Place, Widths, candidate_widths, evolve
from pipeline.allocate.sites import Site, even_start, given_start, sites_of
from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import Beginning, left_over
from pipeline.evaluation.divergence import divergence, final_states
from pipeline.model.scores import Scores
from pipeline.prune.head_norms import spans
from pipeline.prune.importance.measure import only_layers
from pipeline.prune.plan import layers_that_stay
from pipeline.prune.second_order.hessian import projections, with_float64
from pipeline.prune.second_order.narrow import Narrowed, local_order, narrow_units
from pipeline.prune.second_order.removal_order import Removal
from pipeline.prune.second_order.sequential import prune_in_sequence
from pipeline.prune.second_order.supernet import candidate, compose, expectation, removal_of, widened
from pipeline.runtime.artifacts import write_atomically
from pipeline.runtime.checkpoint import (
    Checkpoint,
    load_model,
    open_checkpoint,
    open_tensors,
    write_checkpoint,
    write_tensors,
)
from pipeline.runtime.disk import need_space
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.stage import Inputs, Stage

WORK = "work"  # in the stage's folder until it is done: supernets, searches under way, the teacher's final states

Solve = Callable[[Site, Tensor, Tensor], Tensor]  # (site, weight, H of all ranks) -> weight, on rank 0
Loss = Callable[[int], float]  # KL of the model as it is now, in nats a token, on the text of a selection


@dataclass(frozen=True)
class Bench:
    """What every round works with; `present` says which candidate each projection of the model has."""

    config: Config
    machine: Machine
    work: Path
    source: Checkpoint
    kept: list[int]
    sites: dict[str, Site]
    model: nn.Module
    calibration: Beginning
    present: dict[str, int]


def enabled(config: Config) -> bool:
    """Whether widths are found by evolution."""
    return config.plan.widths == "evolved"


def check(config: Config) -> None:
    """Refuse selections that do not narrow down to one child on more and more text."""
    tokens, survivors = config.supernet.tokens, config.supernet.survivors
    if len(tokens) != len(survivors) or tokens != sorted(tokens):
        raise ValueError(f"supernet.tokens is {tokens}; give one for each of survivors {survivors}, none less")
    if survivors[-1] != 1 or survivors != sorted(survivors, reverse=True):
        raise ValueError(f"supernet.survivors is {survivors}; they must not grow, and end in 1")


def settings(config: Config) -> dict:
    """Give the supernet section, how units are chosen and solved, on which text, and which layers stay."""
    solving = config.restore.model_dump(include={"local", "at_once", "damping", "tokens"})
    depth = {"depth": config.plan.policy["depth"], "keep_first": config.plan.keep_first}
    text = {"seed": config.seed}
    return {"supernet": config.supernet.model_dump(), "restore": solving} | depth | text


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the teacher with W_O and W_down solved for the widths found, the columns of units that go zero.

    Beside it scores.safetensors, whose ranks keep just these units in plan, widths.json, and supernet.json: what each
    round found. Disk: two supernets at most, with a W_O or W_down for each candidate, and the teacher's final states of
    the selection text, from which its logits follow. ValueError if the budget is out of reach.
    """
    asked, ranks, device = config.supernet, machine.ranks, machine.device
    source = open_checkpoint(inputs["subject"], config.model.allow_pickle)
    need_space(out, source.bytes() * (2 + 2 * asked.steps))
    scores = Scores.load(inputs["scores"] / "scores.safetensors")
    shape = json.loads((inputs["shape"] / "shape.json").read_text())
    kept = layers_that_stay(inputs, scores.layers, config.plan.policy)
    sites = sites_of(source.anatomy.sizes, kept, projections(source.anatomy), asked.multiple)
    start = even_start(sites, shape["weights"]) if "weights" in shape else given_start(sites, shape)
    model = load_model(inputs["subject"], device.compute_dtype, device.attention, config.model.trust_remote_code)
    batches = calibration(config, inputs, config.restore.tokens, ranks)
    named = {site.name: site for site in sites}
    bench = Bench(config, machine, out / WORK, source, kept, named, model, batches, {})
    loss = _selection(bench, batches.packed)
    widths, rounds = start, []
    for number in range(asked.rounds):
        found = _round(bench, number, widths, loss)
        machine.say(f"supernet: round {number + 1} of {asked.rounds}, KL {found[0].loss:.4f} to {found[-1].loss:.4f}")
        widths = found[-1].widths
        rounds.append({"widths": widths, "losses": [each.loss for each in found]})
    ways = {"composed": (rounds[-1]["losses"][-1], _composed)}
    if asked.weights != "composed":
        again = _solved_again(bench, widths)
        with placed(model, device, config.device.layer_streaming):
            ways["solved_again"] = (loss(len(asked.tokens) - 1), lambda *_: again)
    taken = min(ways, key=lambda way: ways[way][0]) if asked.weights == "better" else asked.weights
    if ranks.rank == 0:
        solved = ways[taken][1](bench, widths)
        _write(bench, inputs["subject"], out, solved, scores, widths)
        losses = {way: value for way, (value, _) in ways.items()}
        facts = {"sites": list(bench.sites), "start": start, "rounds": rounds, "losses": losses, "taken": taken}
        (out / "supernet.json").write_text(json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(out / WORK, ignore_errors=True)  # NFS keeps, hidden, what is still mapped
    even, best = rounds[0]["losses"][0], ways[taken][0]
    machine.say(f"supernet: KL {even:.4f} of even widths, {best:.4f} of those found, weights {taken}")


def _selection(bench: Bench, text: Packed) -> Loss:
    """Give the loss of the model as it is against the dense one it is now, whose final states are kept on disk.

    Children are selected on calibration text that no Gram matrix saw, while there is any.
    """
    config, ranks, model = bench.config, bench.machine.ranks, bench.model
    pool = left_over(text, bench.calibration.wanted, config.seed) or list(range(len(text)))
    draw = torch.Generator().manual_seed(config.seed)
    rows = [pool[i] for i in torch.randperm(len(pool), generator=draw).tolist()]
    counts = [max(1, min(tokens // text.sequence, len(rows))) for tokens in config.supernet.tokens]
    mine, size = (
        [text[row].tolist() for row in rows[ranks.rank : counts[-1] : ranks.world]],
        config.calibration.batch_size,
    )
    batches = [torch.tensor(mine[at : at + size]) for at in range(0, len(mine), size)]  # none, of fewer rows than ranks
    folder = bench.work / f"teacher-{ranks.rank}-of-{ranks.world}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    device = bench.machine.device
    with placed(model, device, config.device.layer_streaming):
        for index, ids in enumerate(batches):
            kept = final_states(model, ids.to(device.torch)).cpu()
            write_tensors(folder / f"{index:05d}.safetensors", {str(index): kept})
    states = open_tensors(folder) if batches else {}

    def loss(selection: int) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        left = len(range(ranks.rank, counts[selection], ranks.world))
        with only_layers(model, len(bench.source.anatomy.sizes.layers), bench.kept):
            for index, ids in enumerate(batches):
                here = ids[: max(0, left - index * size)]
                if len(here):
                    sums += divergence(model, here, states[str(index)][: here.numel()], config.logits.chunk)
        ranks.sum_([sums])
        return float(sums[0] / sums[1])

    return loss


def _round(bench: Bench, number: int, centre: Widths, loss: Loss) -> list[Generation]:
    """Give the generations of one round: those of an earlier attempt, and those still to be searched."""
    asked, ranks, machine = bench.config.supernet, bench.machine.ranks, bench.machine
    told = bench.work / f"round-{number}.json"
    told_before = json.loads(told.read_text()) if ranks.rank == 0 and told.exists() else []
    found = [Generation(each[0], tuple(each[1]), each[2]) for each in ranks.share(told_before)]
    if len(found) == asked.generations + 1 and number + 1 < asked.rounds:
        return found
    granularity = asked.granularity / 2**number
    places = []
    for site, width in zip(bench.sites.values(), centre, strict=True):
        widths = candidate_widths(width, site.most, site.least, granularity, asked.steps, site.least)
        places.append(Place(site.kind, widths, site.weights))
    stored = open_tensors(_supernet(bench, number, places))

    def measured(widths: Widths, selection: int) -> float:
        choice = dict(zip(bench.sites, widths, strict=True))
        compose(bench.model, bench.source.anatomy, bench.source, stored, choice, bench.present)
        return loss(selection)

    search = evolve(
        places, centre, measured, asked.generations, asked.offspring, asked.survivors, asked.swaps,
        bench.config.seed + number, found[-1] if found else None,
    )  # fmt: skip
    with placed(bench.model, machine.device, bench.config.device.layer_streaming):
        for each in machine.progress(search, asked.generations + 1 - len(found), f"search {number + 1}"):
            found.append(each)
            machine.track.log({"supernet/kl": each.loss}, number * (asked.generations + 1) + each.number, "supernet")
            if ranks.rank == 0:
                write_atomically(told, json.dumps([[one.number, one.widths, one.loss] for one in found]))
    if ranks.rank == 0 and number:
        shutil.rmtree(bench.work / f"supernet-{number - 1}", ignore_errors=True)
    return found


def _supernet(bench: Bench, number: int, places: list[Place]) -> Path:
    """Give the folder of a round's candidates, <projection>.safetensors, made now if an earlier attempt did not."""
    folder, asked, ranks = bench.work / f"supernet-{number}", bench.config.supernet, bench.machine.ranks
    if ranks.share(folder.exists() if ranks.rank == 0 else None):
        return folder
    fresh = folder.with_suffix(".part")
    shutil.rmtree(fresh, ignore_errors=True)
    counts, restore = dict(zip(bench.sites, (place.widths for place in places), strict=True)), bench.config.restore

    def solve(site: Site, weight: Tensor, gram: Tensor) -> Tensor:
        at_once, drop = restore.at_once if site.kind == "ffn" else 1, site.most - counts[site.name][0]
        removal = local_order(restore.local, gram, weight, site.size, drop, at_once, restore.damping)
        tensors = {removal_of(site.name): removal.order}

        def keep(count: int, columns: Tensor) -> None:
            tensors[candidate(site.name, count)] = columns.to("cpu", weight.dtype)

        passed = expectation(weight, gram, removal, counts[site.name], keep, restore.damping)
        fresh.mkdir(parents=True, exist_ok=True)
        write_tensors(fresh / f"{site.name}.safetensors", tensors)
        return passed if asked.accumulation else weight.to(torch.float64)

    _pass(bench, solve, f"supernet {number + 1}")
    if ranks.rank == 0:
        os.replace(fresh, folder)
    ranks.wait("supernet built")
    return folder


def _solved_again(bench: Bench, widths: Widths) -> dict[str, Narrowed]:
    """Give projections of these widths, each solved for what its true predecessors give it; the model has them too."""
    restore, found = bench.config.restore, {}
    wanted = dict(zip(bench.sites, widths, strict=True))

    def solve(site: Site, weight: Tensor, gram: Tensor) -> Tensor:
        at_once = restore.at_once if site.kind == "ffn" else 1
        count = wanted[site.name]
        found[site.name] = narrow_units(weight, gram, site.size, count, restore.local, at_once, restore.damping)
        return found[site.name].weight

    _pass(bench, solve, "solve again")
    return found


def _composed(bench: Bench, widths: Widths) -> dict[str, Narrowed]:
    """Give projections of these widths as the last supernet has them."""
    stored = open_tensors(bench.work / f"supernet-{bench.config.supernet.rounds - 1}")
    found = {}
    for site, width in zip(bench.sites.values(), widths, strict=True):
        order = stored[removal_of(site.name)]
        columns = stored[candidate(site.name, width)]
        scores = Removal(order, torch.zeros(0)).scores()
        found[site.name] = Narrowed(widened(columns, order, width, site.size * site.most), scores)
    return found


def _pass(bench: Bench, solve: Solve, label: str) -> None:
    """Put dense weights into the model, and then, layer by layer, what rank 0 solves for the inputs of all ranks."""
    ranks, model, place = bench.machine.ranks, bench.model.cpu(), with_float64(bench.machine.device.torch)
    bench.present.clear()
    spanned = (name.format(layer=layer) for name in spans(bench.source.anatomy) for layer in bench.kept)
    with torch.no_grad():
        for name in (*(f"{name}.weight" for name in bench.sites), *spanned):
            model.get_parameter(name).copy_(bench.source[name])

    def prune(name: str, weight: Tensor, gram: Tensor) -> Tensor:
        ranks.sum_([gram])
        whole = torch.zeros(weight.shape, dtype=torch.float64, device=gram.device)
        if ranks.rank == 0:
            whole.copy_(solve(bench.sites[name], bench.source[f"{name}.weight"].to(place), gram))
        ranks.sum_([whole])
        return whole

    decoder, anatomy, device = model.get_decoder(), bench.source.anatomy, bench.machine.device.torch
    passes = prune_in_sequence(decoder, anatomy, list(bench.calibration), prune, device, bench.kept)
    for _ in bench.machine.progress(passes, len(bench.sites), label):
        pass


def _write(bench: Bench, teacher: Path, out: Path, solved: dict[str, Narrowed], scores: Scores, widths: Widths) -> None:
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
    write_checkpoint(out, source.config, stream, bench.config.checkpoint.shard_bytes, teacher)
    scores.with_units(heads, neurons).save(out / "scores.safetensors")
    (out / "widths.json").write_text(json.dumps([asdict(each) for each in sizes]))


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
    resumable=True,
    shows={"restored": "", "supernet.json": "supernet.json"},
)
