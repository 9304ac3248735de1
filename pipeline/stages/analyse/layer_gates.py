"""gates: the layers that stay, by gates learnt on them: the smallest goes, the rest learn anew (TRSP, stage 1)."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import stream
from pipeline.distill.gates import Learning, learn, smallest
from pipeline.distill.next_token import LanguageHead
from pipeline.evaluation.perplexity import tally
from pipeline.prune.importance.measure import only_layers
from pipeline.runtime.artifacts import write_atomically
from pipeline.runtime.checkpoint import load_model, open_checkpoint
from pipeline.runtime.layer_streaming import need_memory
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.stage import Inputs, Stage

ROUNDS = "rounds.json"


def enabled(config: Config) -> bool:
    """Whether layers go by learnt gates."""
    return config.plan.depth == "gates"


def check(config: Config) -> None:
    """Refuse a text that is shorter than a step, before any work."""
    if enabled(config):
        _steps(config)


def settings(config: Config) -> dict:
    """Give how gates are learnt, the layers that must stay, the tokens that a choice is measured on, and the seed."""
    measured = {"keep_first": config.plan.keep_first, "depth_tokens": config.plan.depth_tokens}
    return config.layer_gates.model_dump() | measured | {"seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write depth.json: the layers `kept`, their `loss`, every choice `tried` with its loss, and rounds.json.

    rounds.json holds, for every layer picked, the gates that told it and the mean loss while they were learnt.
    """
    device, ranks, asked = machine.device, machine.ranks, config.layer_gates
    anatomy = open_checkpoint(inputs["subject"], config.model.allow_pickle).anatomy
    total = len(anatomy.sizes.layers)
    count = json.loads((inputs["shape"] / "shape.json").read_text())["layers"]
    if not config.plan.keep_first <= count <= total:
        raise ValueError(f"shape.layers is {count}; it must lie between {config.plan.keep_first} and {total}")
    weights = anatomy.parameters()[0] * device.compute_dtype.itemsize
    need_memory(device, {"weights": weights}, "plan.depth=gates", "set plan.depth=influence, loss or evolved")
    model = load_model(inputs["subject"], device.compute_dtype, device.attention, config.model.trust_remote_code)
    model = model.to(device.torch).requires_grad_(False)
    head, how = LanguageHead(model, config.logits.chunk), Learning(asked.form, asked.penalty, asked.learning_rate)
    steps, measured = _steps(config), calibration(config, inputs, config.plan.depth_tokens, ranks)
    rounds = ranks.share(_rounds(out / ROUNDS) if ranks.rank == 0 else None)
    kept = [layer for layer in range(total) if layer not in {each["picked"] for each in rounds}]
    bar = iter(machine.progress(range(len(kept) - count), len(kept) - count, "gates"))
    while len(kept) > count:
        batches = islice(_batches(config, measured.packed, len(rounds) * steps * asked.batch_size, ranks), steps)
        with only_layers(model, total, kept):
            gates, loss = learn(model, head, _ones(total, model), kept, batches, how, ranks.sum_)
        picked = smallest(gates, kept, config.plan.keep_first)
        kept.remove(picked)
        left = _loss(config, model, total, kept, measured, ranks)
        rounds.append({"picked": picked, "loss": loss, "gates": gates.tolist(), "loss_without": left})
        if ranks.rank == 0:
            write_atomically(out / ROUNDS, json.dumps(rounds))
        machine.say(f"gates: layer {picked} goes, its gate {float(gates[picked]):.4f}; loss without it {left:.3f}")
        next(bar, None)
    if ranks.rank == 0:
        _write(out / "depth.json", total, kept, rounds)


def _write(path: Path, total: int, kept: list[int], rounds: list[dict]) -> None:
    tried, left = [], list(range(total))
    for each in rounds:
        left.remove(each["picked"])
        tried.append({"kept": list(left), "loss": each["loss_without"]})
    path.write_text(json.dumps({"kept": kept, "loss": tried[-1]["loss"] if tried else None, "tried": tried}))


def _ones(total: int, model: torch.nn.Module) -> Tensor:
    """Give gates [layer] that change nothing: every choice is learnt from the model as it then is."""
    like = next(model.parameters())
    return torch.ones(total, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _batches(config: Config, text: Packed, start: int, ranks) -> Iterator[tuple[Tensor, float]]:
    """Return this rank's rows of every step, and their share of the `layer_gates.batch_size` rows of all ranks."""
    for batch in stream(text, config.layer_gates.batch_size, 0, 1, start, config.seed):
        mine = batch[ranks.rank :: ranks.world]
        yield mine, len(mine) / len(batch)


def _loss(config: Config, model, total: int, kept: list[int], batches, ranks) -> float:
    with only_layers(model, total, kept):
        sums = tally(model, batches, config.logits.chunk)
    ranks.sum_([sums])
    return float(sums[0] / sums[2])


def _rounds(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def _steps(config: Config) -> int:
    per_step = config.layer_gates.batch_size * config.data.sequence_length
    if config.layer_gates.tokens < per_step:
        raise ValueError(
            f"layer_gates.tokens is {config.layer_gates.tokens}, less than one step of layer_gates.batch_size "
            f"({config.layer_gates.batch_size}) x data.sequence_length ({config.data.sequence_length}) = "
            f"{per_step} tokens; raise it or lower the batch"
        )
    return config.layer_gates.tokens // per_step


STAGE = Stage(
    name="layer_gates",
    makes="depth",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "shape"),
    enabled=enabled,
    check=check,
    resumable=True,  # goes on after the last layer that an interrupted attempt picked
    shows={"depth.json": "depth.json"},
)
