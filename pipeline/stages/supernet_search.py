"""The rounds of the supernet stage: candidates of every W_O and W_down, and an evolutionary search among them.

A round builds its supernet from the dense weights around the widths that the round before found, then searches it.
Every generation is on disk before the next begins.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.allocate.evolution import Choice, Generation, Place, candidate_widths, evolve
from pipeline.allocate.sites import Site
from pipeline.config import Config
from pipeline.data.stream import Beginning, left_over
from pipeline.evaluation.divergence import divergence, final_states
from pipeline.model.causal import CausalModel, decoder_of
from pipeline.prune.head_norms import spans
from pipeline.prune.importance.measure import only_layers
from pipeline.prune.second_order.hessian import with_float64
from pipeline.prune.second_order.narrow import Narrowed, local_order, narrow_units
from pipeline.prune.second_order.removal_order import Removal
from pipeline.prune.second_order.sequential import prune_in_sequence
from pipeline.prune.second_order.supernet import candidate, compose, expectation, removal_of, widened
from pipeline.runtime.checkpoint import Checkpoint, open_tensors
from pipeline.runtime.checkpoint_writer import write_tensors
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.machine import Machine

Solve = Callable[[Site, Tensor, Tensor], Tensor]  # (site, weight, H of all ranks) -> weight, on rank 0
Loss = Callable[[int], float]  # KL of the current model in nats per token, on the text of a selection


@dataclass(frozen=True)
class Bench:
    """What every round works with.

    `sites` are the projections by name, in the order of the stream; `present` holds the candidate that each projection
    of `model` has; `work` is a folder for supernets, generations and the final states of the dense model.
    """

    config: Config
    machine: Machine
    work: Path
    source: Checkpoint
    kept: list[int]
    sites: dict[str, Site]
    model: CausalModel
    calibration: Beginning
    present: dict[str, int]

    def supernet(self, number: int) -> Path:
        """The folder of a round's candidates."""
        return self.work / f"supernet-{number}"


def selection_loss(bench: Bench) -> Loss:
    """Return the loss of the current model against the dense one, whose final states are written to disk here.

    Children are selected on calibration text that no Hessian was measured on, while there is any.
    """
    config, ranks, model, text = bench.config, bench.machine.ranks, bench.model, bench.calibration.packed
    pool = left_over(text, bench.calibration.wanted, config.seed) or list(range(len(text)))
    draw = torch.Generator().manual_seed(config.seed)
    rows = [pool[i] for i in torch.randperm(len(pool), generator=draw).tolist()]
    counts = [max(1, min(tokens // text.sequence, len(rows))) for tokens in config.supernet.tokens]
    size = config.calibration.batch_size
    own = [text[row].tolist() for row in rows[ranks.rank : counts[-1] : ranks.world]]
    batches = [torch.tensor(own[at : at + size]) for at in range(0, len(own), size)]  # none, of fewer rows than ranks
    folder = bench.work / f"dense-{ranks.rank}-of-{ranks.world}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    device = bench.machine.device
    with placed(model, device, config.device.layer_streaming):
        for index, ids in enumerate(batches):
            write_tensors(
                folder / f"{index:05d}.safetensors", {str(index): final_states(model, ids.to(device.torch)).cpu()}
            )
    states = open_tensors(folder) if batches else {}

    def loss(selection: int) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        left = len(range(ranks.rank, counts[selection], ranks.world))
        with only_layers(model, len(bench.source.anatomy.sizes.layers), bench.kept):
            for index, ids in enumerate(batches):
                part = ids[: max(0, left - index * size)]
                if len(part):
                    sums += divergence(model, part, states[str(index)][: part.numel()], config.logits.chunk)
        ranks.sum_([sums])
        return float(sums[0] / sums[1])

    return loss


def search_round(bench: Bench, number: int, centre: Choice, loss: Loss) -> list[Generation]:
    """Return the generations of one round: those of an interrupted attempt, and those still to be searched."""
    section, machine = bench.config.supernet, bench.machine
    ledger = Ledger(bench.work / f"round-{number}.jsonl", Generation, machine.ranks)
    done = ledger.entries
    if len(done) == section.generations + 1 and number + 1 < section.rounds:
        return done
    granularity = section.granularity / 2**number
    places = []
    for site, width in zip(bench.sites.values(), centre, strict=True):
        widths = candidate_widths(width, site.most, site.least, granularity, section.steps, site.least)
        places.append(Place(site.kind, widths, site.weights))
    stored = open_tensors(_supernet(bench, number, places))

    def measured(widths: Choice, selection: int) -> float:
        choice = dict(zip(bench.sites, widths, strict=True))
        compose(bench.model, bench.source.anatomy, bench.source, stored, choice, bench.present)
        return loss(selection)

    search = evolve(
        places,
        centre,
        measured,
        section.generations,
        section.offspring,
        section.survivors,
        section.swaps,
        bench.config.seed + number,
        done[-1] if done else None,
    )
    left = section.generations + 1 - len(done)
    with placed(bench.model, machine.device, bench.config.device.layer_streaming):
        for generation in machine.progress(search, left, f"supernet search {number + 1}"):
            ledger.append(generation)
            step = number * (section.generations + 1) + generation.number
            machine.track.log({"supernet/kl": generation.loss}, step, "supernet")
    if machine.ranks.rank == 0 and number:
        shutil.rmtree(bench.supernet(number - 1), ignore_errors=True)
    return ledger.entries


def solved_again(bench: Bench, widths: Choice) -> dict[str, Narrowed]:
    """Return projections of these widths, each solved for the inputs that its predecessors give; the model has them."""
    restore = bench.config.restore
    counts = dict(zip(bench.sites, widths, strict=True))
    result: dict[str, Narrowed] = {}

    def solve(site: Site, weight: Tensor, hessian: Tensor) -> Tensor:
        at_once = restore.at_once if site.kind == "ffn" else 1
        count = counts[site.name]
        result[site.name] = narrow_units(weight, hessian, site.size, count, restore.local, at_once, restore.damping)
        return result[site.name].weight

    _pass(bench, solve, "supernet: solve again")
    return result


def composed(bench: Bench, widths: Choice) -> dict[str, Narrowed]:
    """Return projections of these widths as the last supernet holds them."""
    stored = open_tensors(bench.supernet(bench.config.supernet.rounds - 1))
    result = {}
    for site, width in zip(bench.sites.values(), widths, strict=True):
        order = stored[removal_of(site.name)]
        columns = stored[candidate(site.name, width)]
        scores = Removal(order, torch.zeros(0)).scores()
        result[site.name] = Narrowed(widened(columns, order, width, site.size * site.most), scores)
    return result


def _supernet(bench: Bench, number: int, places: list[Place]) -> Path:
    """Return the folder of a round's candidates, <projection>.safetensors; build them unless an attempt before did."""
    folder, section, ranks = bench.supernet(number), bench.config.supernet, bench.machine.ranks
    if ranks.share(folder.exists() if ranks.rank == 0 else None):
        return folder
    fresh = folder.with_suffix(".part")
    shutil.rmtree(fresh, ignore_errors=True)
    counts = dict(zip(bench.sites, (place.widths for place in places), strict=True))
    restore = bench.config.restore

    def solve(site: Site, weight: Tensor, hessian: Tensor) -> Tensor:
        at_once, drop = restore.at_once if site.kind == "ffn" else 1, site.most - counts[site.name][0]
        removal = local_order(restore.local, hessian, weight, site.size, drop, at_once, restore.damping)
        tensors = {removal_of(site.name): removal.order}

        def keep(count: int, columns: Tensor) -> None:
            tensors[candidate(site.name, count)] = columns.to("cpu", weight.dtype)

        passed = expectation(weight, hessian, removal, counts[site.name], keep, restore.damping)
        fresh.mkdir(parents=True, exist_ok=True)
        write_tensors(fresh / f"{site.name}.safetensors", tensors)
        return passed if section.accumulation else weight.to(torch.float64)

    _pass(bench, solve, f"supernet {number + 1}")
    if ranks.rank == 0:
        os.replace(fresh, folder)
    ranks.wait("supernet built")
    return folder


def _pass(bench: Bench, solve: Solve, label: str) -> None:
    """Put the dense weights into the model, then, layer by layer, what rank 0 solves for the inputs of all ranks."""
    ranks, model, place = bench.machine.ranks, bench.model.cpu(), with_float64(bench.machine.device.torch)
    bench.present.clear()
    gains = (name.format(layer=layer) for name in spans(bench.source.anatomy) for layer in bench.kept)
    with torch.no_grad():
        for name in (*(f"{name}.weight" for name in bench.sites), *gains):
            model.get_parameter(name).copy_(bench.source[name])

    def prune(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        ranks.sum_([hessian])
        solved = torch.zeros(weight.shape, dtype=torch.float64, device=hessian.device)
        if ranks.rank == 0:
            solved.copy_(solve(bench.sites[name], bench.source[f"{name}.weight"].to(place), hessian))
        ranks.sum_([solved])
        return solved

    decoder, anatomy, device = decoder_of(model), bench.source.anatomy, bench.machine.device.torch
    passes = prune_in_sequence(decoder, anatomy, list(bench.calibration), prune, device, bench.kept)
    for _ in bench.machine.progress(passes, len(bench.sites), label):
        pass
