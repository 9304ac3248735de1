"""Training all weights of a model folder to a model folder: teacher correction, regularization and recovery."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.config.training import Training
from pipeline.costmodel.training_memory import state_bytes
from pipeline.data.packing import Packed
from pipeline.data.stream import Rows, stream
from pipeline.distill.holdout import hold_out, share_out
from pipeline.distill.loop import HELD_OUT, Course, train
from pipeline.distill.schedule import learning_rate
from pipeline.distill.selection import Selection
from pipeline.model.marks import Marked
from pipeline.runtime.artifacts import write_atomically
from pipeline.runtime.checkpoint import Checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.class_parameters import ClassParameters, stored_tensors
from pipeline.runtime.disk import need_space
from pipeline.runtime.engine import Engine
from pipeline.runtime.fused_layers import fused_layers, operators
from pipeline.runtime.hashing import text_digest
from pipeline.runtime.layer_streaming import need_memory
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_class import class_of
from pipeline.runtime.model_loader import load_model
from pipeline.training_settings import accumulation, held_out_rows, steps_of

METRICS = "metrics.jsonl"
SUMS = "metrics.sums"  # beside checkpoints: a digest of each line of METRICS, by which the exported state is chosen
CHECKPOINTS = "checkpoints"
STATE_BYTES = 12  # of a parameter in a resumable checkpoint: a float32 weight and two moments
WEIGHT_BYTES = 4
LAST = Selection(metric="", best=False, patience=None)  # export the last state, train to the end


@dataclass(frozen=True)
class Stretch:
    """Which of `count` equal parts of a training this is, and the folder with the metrics of the earlier parts."""

    number: int
    count: int
    before: Path | None


ALL = Stretch(1, 1, None)


@dataclass(frozen=True)
class Source:
    """Where the batches of a training come from.

    `tokens`: how many the first n steps count, on all ranks. `batches`: this rank's micro-batches from a step on, made
    of a text without its held-out part; the current model can be used for them through the engine.
    """

    steps: int
    tokens: Callable[[int], int]
    batches: Callable[[Engine, Rows, int], Iterator[Tensor]]
    marked: bool  # batches have marks (model/marks.py)


def train_model(
    section: str,
    config: Config,
    origin: Checkpoint,
    module: Callable[[Callable[[Path], nn.Module]], nn.Module],
    text: Packed,
    out: Path,
    machine: Machine,
    stretch: Stretch = ALL,
    skipped: int = 0,
    selection: Selection = LAST,
    marked: bool = False,
    source: Source | None = None,
) -> None:
    """Write the model trained from `origin` as a model folder in float32, and metrics.jsonl; every rank takes part.

    Parts of a training share one schedule, one count of steps and one reading of the text; each begins with an
    optimizer at step 0, and its metrics with those of the earlier parts.

    `section`: the name of the settings; `module`: makes what the engine trains from a function that loads a model
    folder in the compute type; `skipped`: sequences at the beginning of the text that an earlier training read;
    `marked`: the module reads tokens with marks, where the text has them (`data.loss_on`).
    `source`: where batches come from, None for the text itself.
    `selection`: which state is exported, and recovery.json is written where it has a metric. Checkpoints that an
    interrupted attempt left in `out` are resumed from, bit for bit; a damaged one is reported and an earlier one taken.
    """
    options, ranks = getattr(config, section), machine.ranks
    marked = marked and text.marked
    source = source or _of_text(section, config, machine, skipped, marked)
    count, steps = accumulation(section, options, ranks.world), source.steps
    first, last = (steps * part // stretch.count for part in (stretch.number - 1, stretch.number))
    parameters = sum(math.prod(shape) for shape in origin.anatomy.shapes().values())
    kept = options.save_total_limit + 1 + selection.best  # one more while it is written
    need_space(out, parameters * (STATE_BYTES * kept + WEIGHT_BYTES))
    start = ClassParameters(class_of(origin.config, origin.folder), origin)
    rest, held = hold_out(Marked(text) if marked else text, held_out_rows(section, config), section)
    held_out = share_out(held, options.micro_batch_size, ranks.rank, ranks.world, marked)
    with ExitStack() as undo:
        engine = _engine(section, config, options, module, machine, count, undo)
        done, selection = _resumed(engine, section, out, first, last, stretch.before, selection, machine)
        if done == 0:
            engine.take(start)
        elif done:
            machine.say(f"{section}: resumes after step {first + done} of {steps}")
        every = (options.eval_steps, options.save_steps, options.save_total_limit)
        before = source.tokens(first)
        course = Course(
            section,
            last - first,
            count,
            lambda taken: source.tokens(first + taken) - before,
            *every,
            config.seed + first,
            source.marked,
        )
        peak, warmup, floor = options.learning_rate, options.warmup_ratio, options.min_lr_ratio

        def rate(step: int) -> float:
            return learning_rate(options.lr_scheduler, first + step, steps, peak, warmup, floor)

        def record(metrics: dict[str, float]) -> None:
            whole = {"step": first + metrics["step"], "tokens": before + metrics["tokens"]}
            _record(out, section, steps, machine, metrics | whole)

        selection = train(
            engine,
            source.batches(engine, rest, first + done),
            held_out,
            course,
            rate,
            done,
            out / CHECKPOINTS,
            record,
            lambda steps_left: machine.progress(steps_left, last - first - done, section),
            selection,
        )
        if selection.exported not in (None, selection.last_step):
            engine.load(out / CHECKPOINTS, selection.exported) if selection.exported else engine.take(start)
        _write(config, engine, origin, start, out, ranks.rank)
    for line in selection.messages(section, first):
        machine.say(line)
    if selection.metric and ranks.rank == 0:
        selection.facts(first).save(out)
    ranks.wait(f"{section} written")
    if ranks.rank == 0:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _of_text(section: str, config: Config, machine: Machine, skipped: int, marked: bool) -> Source:
    """Return the batches of packed text behind its first `skipped` sequences."""
    options, ranks, sequence = getattr(config, section), machine.ranks, config.data.sequence_length
    batch, micro = options.global_batch_size, options.micro_batch_size

    def batches(engine: Engine, text: Rows, step: int) -> Iterator[Tensor]:
        return stream(text, micro, ranks.rank, ranks.world, skipped + step * batch, config.seed)

    return Source(steps_of(section, options, sequence), lambda steps: steps * batch * sequence, batches, marked)


def need_training_memory(section: str, config: Config, module: Any, precision: str, machine: Machine) -> None:
    """Raise ValueError where weights, gradients and optimizer alone need more memory than a device has.

    Nothing is checked where raw DeepSpeed settings change ZeRO, for example by offloading: the need is not known then.
    """
    if "zero_optimization" in config.deepspeed.extra:
        return
    own = sum(parameter.numel() for _, parameter in module.parameters_by_name())
    frozen = sum(parameter.numel() for parameter in module.parameters()) - own
    stage, ranks = config.deepspeed.stage, machine.ranks.world
    needed = state_bytes(own, frozen, precision, stage, ranks)
    what = f"{section} under ZeRO {stage} on {ranks} {'rank' if ranks == 1 else 'ranks'}"
    need_memory(machine.device, needed, what, "raise deepspeed.stage, start more ranks")


def _resumed(
    engine: Engine,
    section: str,
    out: Path,
    first: int,
    last: int,
    before: Path | None,
    selection: Selection,
    machine: Machine,
) -> tuple[int, Selection]:
    """Load the checkpoint to resume from; return the steps done in this part and the selection after them.

    Metrics of steps that will be taken again are deleted; where nothing is resumed, those of the part before are taken.
    """
    ranks, metrics, checkpoints = machine.ranks, out / METRICS, out / CHECKPOINTS
    earlier = (before / METRICS).read_text(encoding="utf-8") if before else ""
    rows = _rows(out, len(earlier.splitlines())) if ranks.rank == 0 else []

    def selected(step: int) -> Selection:
        own = selection
        for row in rows[: step + 1]:
            own = own.after(row["step"] - first, row)
        return own

    def usable(step: int, is_sound: Callable[[int], bool]) -> bool:
        exported = selected(step).exported if step < len(rows) else None
        return step < len(rows) and (not exported or is_sound(exported))

    done, lines = engine.newest_sound(checkpoints, last - first, usable)
    for line in lines:
        machine.say(f"{section}: damaged checkpoint {line}; resumes from an earlier state")
    done = done or 0
    if done:
        engine.load(checkpoints, done)
    if ranks.rank == 0:
        kept = "".join(json.dumps(row) + "\n" for row in (rows[: done + 1] if done else []))
        checkpoints.mkdir(exist_ok=True)
        write_atomically(metrics, earlier + kept)
        write_atomically(checkpoints / SUMS, "".join(map(_sum, (earlier + kept).splitlines(keepends=True))))
    ranks.wait(f"{section} begins")
    return done, Selection(**ranks.share(asdict(selected(done) if done else selection)))


def _rows(out: Path, skipped: int) -> list[dict[str, Any]]:
    """Return the rows of a training's metrics behind the first ones, up to a damaged line; none without a file."""
    path, sums = out / METRICS, out / CHECKPOINTS / SUMS
    if not (path.is_file() and sums.is_file()):
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    written = sums.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    pairs = takewhile(lambda pair: _sum(pair[0]) == pair[1], zip(lines[skipped:], written[skipped:]))
    return [json.loads(line) for line, _ in pairs]


def _sum(line: str) -> str:
    """Return the line of SUMS for a line of METRICS."""
    return text_digest(line) + "\n"


def _engine(
    section: str, config: Config, options: Training, module: Callable, machine: Machine, count: int, undo: ExitStack
) -> Engine:
    """Return the engine of a training; `undo` closes it and restores the forwards of the models it loads."""
    device = machine.device
    bf16 = options.precision == "bf16" or (options.precision == "auto" and device.compute_dtype == torch.bfloat16)
    chosen, dtype = operators(device.kernels, device.kind), torch.bfloat16 if bf16 else torch.float32

    def load(folder: Path) -> nn.Module:
        model = load_model(folder, dtype, device.attention)
        undo.enter_context(fused_layers(model, chosen))
        return model

    trained = module(load)
    need_training_memory(section, config, trained, "bf16" if bf16 else "fp32", machine)
    engine = Engine(
        trained,
        device,
        machine.ranks,
        stage=config.deepspeed.stage,
        bf16=bf16,
        micro_batch=options.micro_batch_size,
        accumulation=count,
        clip=options.max_grad_norm,
        betas=options.adam_betas,
        weight_decay=options.weight_decay,
        extra=config.deepspeed.extra,
    )
    undo.callback(engine.close)
    return engine


def _record(out: Path, section: str, steps: int, machine: Machine, metrics: dict[str, float]) -> None:
    """Append a step's numbers to the metrics and the tracker; print those of the held-out text."""
    if machine.ranks.rank == 0:
        line = json.dumps(metrics) + "\n"
        for path, text in ((out / METRICS, line), (out / CHECKPOINTS / SUMS, _sum(line))):
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
    numbers = {name: value for name, value in metrics.items() if name != "step"}
    machine.track.log(numbers, int(metrics["step"]), section)
    held = [(name.removeprefix(HELD_OUT), value) for name, value in metrics.items() if name.startswith(HELD_OUT)]
    if held:
        parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        parts += [f"held-out {name.replace('kl', 'KL').replace('_', ' ')} {value:.4f}" for name, value in held]
        machine.say(f"{section}: step {metrics['step']}/{steps}, {', '.join(parts)}")


def _write(config: Config, engine: Engine, origin: Checkpoint, start: ClassParameters, out: Path, rank: int) -> None:
    """Write the model under the names of the origin's tensors; every rank takes part, rank 0 writes."""
    tensors = _tensors(engine, origin, start)
    if rank == 0:
        settings = origin.config | {"dtype": "float32"}
        write_checkpoint(out, settings, tensors, config.checkpoint.shard_bytes, origin.folder)
    else:
        for _ in tensors:
            pass


def _tensors(engine: Engine, origin: Checkpoint, start: ClassParameters) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained weights, then the other tensors of the model as they are in the origin.

    A stored copy of a tied output matrix is left out, as it would be the old one.
    """
    trained = {origin.anatomy.head} if origin.config.get("tie_word_embeddings") else set()
    for name, tensor in stored_tensors(start, engine.student_state()):
        trained.add(name)
        yield name, tensor
    yield from ((name, origin[name]) for name in origin.anatomy.shapes() if name not in trained)
