"""What recovery training needs: memory of a device, time of a step, and the answer for a whole run before it starts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil

from pipeline.costmodel.chip import ELEMENT_BYTES, Chip
from pipeline.costmodel.cost import (
    MEMORY_SHARE,
    Work,
    attention_products,
    attention_vector_seconds,
    cache_bytes,
    ffn_products,
    ffn_vector_seconds,
    kernel_seconds,
    mixture_products,
    mixture_seconds,
    pass_seconds,
    products_seconds,
    routed_rows,
)
from pipeline.costmodel.gemm import allreduce_seconds, gather_seconds, gemm_seconds, vector_seconds
from pipeline.costmodel.mixture import Mixture
from pipeline.costmodel.shapes import ModelShape
from pipeline.costmodel.training_memory import activation_bytes, state_bytes, used_neurons

KERNEL_BACKWARD = 2.5  # products of attention's backward pass over those of its forward pass: five over two
VECTOR_BACKWARD = 2.0  # traffic of the backward element-wise operations over the forward ones
LOGIT_PASSES = 16  # times logits are read or written in fp32 to get the loss and its gradient
MOST_DEVICES = 4096
LIVE_PARAMETERS = 1_000_000_000  # that ZeRO-3 gathers at once, beside the running module's: DeepSpeed's default

PURPOSES = {
    "distill": "recovery",
    "onpolicy": "on-policy distillation",
    "regularize": "regularization",
    "teacher_correction": "teacher correction",
}


@dataclass(frozen=True)
class Recovery:
    """What decides the cost of a training run; `batch` is in sequences and counts all devices."""

    steps: int
    sequence: int
    batch: int
    micro_batch: int
    precision: str
    zero_stage: int
    checkpointing: bool
    chunk: int  # tokens whose logits exist at once
    loss_buffers: int  # float32 tensors that the loss works in, beside a chunk's products of student and teacher
    loss_block: int  # logits that such a tensor holds at most
    score_tokens: int = 0  # tokens the whole model alone reads before
    section: str = "distill"  # of the settings, named where they cannot be met
    written: int = 0  # tokens of a sequence that the student writes before the pass, one after another

    @property
    def rows(self) -> int:
        return self.micro_batch * self.sequence

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * (self.written or self.sequence)


@dataclass(frozen=True)
class Needs:
    """What a run needs: devices, bytes of the fullest one by purpose, seconds of a step by purpose, hours in all."""

    purpose: str
    chip: str
    devices: int
    device_bytes: float
    memory: dict[str, float]
    step: dict[str, float]
    steps: int
    tokens: int
    hours: float
    fits: bool

    @property
    def bytes_per_device(self) -> float:
        return sum(self.memory.values())

    def to_json(self) -> dict:
        return {**asdict(self), "bytes_per_device": self.bytes_per_device}

    def sentence(self) -> str:
        """The answer of a dry run in one line."""
        verdict = "" if self.fits else f", MORE than {MEMORY_SHARE:.0%} of a device's {self.device_bytes / 1e9:.0f} GB"
        return (
            f"{self.purpose} needs {self.devices} x {self.bytes_per_device / 1e9:.2f} GB on {self.chip}{verdict} and "
            f"{_duration(self.hours)} for {self.tokens:,} tokens: {self.steps} steps of "
            f"{sum(self.step.values()):.3g} s"
        )


def training_needs(
    chip: Chip, teacher: ModelShape | None, student: ModelShape, run: Recovery, devices: int | None = None
) -> Needs:
    """Return what a run needs on `devices`, or on the fewest (a power of two) whose memory holds it.

    Without a `teacher` the model is trained on the text alone.
    Raise ValueError where the batch cannot be split over the devices, or where no number of them is enough.
    """
    if devices is not None:
        return _needs(chip, teacher, student, run, devices)
    tried, most = 1, run.batch // run.micro_batch
    while tried <= min(most, MOST_DEVICES) and run.batch % (run.micro_batch * tried) == 0:
        needs = _needs(chip, teacher, student, run, tried)
        if needs.fits:
            return needs
        tried *= 2
    raise ValueError(
        f"{run.section}.global_batch_size: {run.batch} in micro-batches of {run.micro_batch} splits over no number of "
        f"{chip.name} devices with enough memory; raise deepspeed.stage (now {run.zero_stage}) or "
        f"{run.section}.global_batch_size, lower {run.section}.micro_batch_size, or set "
        f"{run.section}.gradient_checkpointing=true"
    )


def memory_parts(teacher: ModelShape | None, student: ModelShape, run: Recovery, devices: int) -> dict[str, float]:
    """Return the bytes on one device by purpose, as DeepSpeed shares them out at a ZeRO stage.

    Stage 3 gathers what runs and fetches ahead, at most `LIVE_PARAMETERS` and the output matrices. Buckets for
    gradients are of the share that is left free.
    """
    size, own, frozen = ELEMENT_BYTES[run.precision], student.parameters(), teacher.parameters() if teacher else 0
    heads = sum(model.vocabulary * model.hidden for model in (student, teacher) if model)
    gathers = run.zero_stage >= 3 and devices > 1
    cached = {"cache": cache_bytes(student, run.rows, run.precision)} if run.written else {}
    return state_bytes(own, frozen, run.precision, run.zero_stage, devices) | {
        "gathered": size * min(own + frozen, LIVE_PARAMETERS + heads) if gathers else 0,
        "activations": run.rows * activation_bytes(student, run.precision, run.checkpointing),
        "teacher_activations": run.rows * size * (6 * teacher.hidden + 4 * used_neurons(teacher)) if teacher else 0,
        "loss": _loss_bytes(student, run, 2 if teacher else 1),
        **cached,
    }


def _loss_bytes(student: ModelShape, run: Recovery, models: int) -> int:
    """Bytes of the chunked loss: each model's product, the fp32 work space, and the gradients it makes as it goes."""
    size, logits = ELEMENT_BYTES[run.precision], min(run.chunk, run.rows) * student.vocabulary
    work_space = run.loss_buffers * 4 * min(logits, run.loss_block)
    gradients = student.vocabulary * student.hidden * (4 + size) + run.rows * student.hidden * size
    return models * size * logits + work_space + gradients


def step_parts(
    chip: Chip, teacher: ModelShape | None, student: ModelShape, run: Recovery, devices: int
) -> dict[str, float]:
    """Return the seconds of one optimizer step by purpose; communication is taken not to overlap with the rest."""
    accumulation = run.batch // (run.micro_batch * devices)
    work = Work(run.micro_batch, run.sequence, run.sequence, run.precision, row_major=True)
    own, frozen = student.parameters(), teacher.parameters() if teacher else 0
    passes = 3 if run.precision == "fp32" else 4  # fp32 weight, moments and (bf16) weight written
    share = own / (devices if run.zero_stage >= 1 else 1)
    writing = {"writing": accumulation * _writing_seconds(chip, student, run, devices)} if run.written else {}
    return {
        "student": accumulation * _student_seconds(chip, student, work, run.checkpointing),
        "teacher": accumulation * pass_seconds(chip, teacher, work) if teacher else 0.0,
        "loss": accumulation * _loss_seconds(chip, teacher, student, run),
        "optimizer": vector_seconds(chip, share * 4 * (passes + 4), chip.align_bytes),
        "communication": _communication_seconds(chip, own, frozen, run, devices, accumulation),
        **writing,
    }


def _needs(chip: Chip, teacher: ModelShape | None, student: ModelShape, run: Recovery, devices: int) -> Needs:
    if run.batch % (run.micro_batch * devices):
        raise ValueError(
            f"{run.section}.global_batch_size: {run.batch} is no multiple of {run.section}.micro_batch_size "
            f"({run.micro_batch}) times {devices} devices; set a multiple"
        )
    memory = memory_parts(teacher, student, run, devices)
    step = step_parts(chip, teacher, student, run, devices)
    work = Work(run.micro_batch, run.sequence, run.sequence, run.precision, row_major=True)
    scoring = ceil(run.score_tokens / (run.rows * devices)) * pass_seconds(chip, teacher or student, work)
    return Needs(
        purpose=PURPOSES[run.section],
        chip=chip.name,
        devices=devices,
        device_bytes=chip.hbm_bytes,
        memory=memory,
        step=step,
        steps=run.steps,
        tokens=run.tokens,
        hours=(run.steps * sum(step.values()) + scoring) / 3600.0,
        fits=sum(memory.values()) <= MEMORY_SHARE * chip.hbm_bytes,
    )


def _student_seconds(chip: Chip, shape: ModelShape, work: Work, checkpointing: bool) -> float:
    """Forward and backward of all layers: each product once more for its input's and once for its weight's gradient."""
    passes = 2 if checkpointing else 1  # forward
    attention = attention_products(work, shape.hidden, shape.heads, shape.groups, shape.head_size)
    vector = attention_vector_seconds(chip, work, shape.hidden, shape.heads, shape.groups, shape.head_size)
    kernel = kernel_seconds(chip, work, shape.heads, shape.groups, shape.head_size)
    layer = _trained_seconds(chip, work, attention, vector, passes)
    layer += (passes + KERNEL_BACKWARD) * kernel + (passes + 2) * chip.layer_seconds
    sparse, dense = shape.mixture.layers(shape.layers) if shape.mixture else (0, shape.layers)
    ffn = ffn_products(work, shape.hidden, shape.neurons)
    ffns = dense * _trained_seconds(
        chip, work, ffn, ffn_vector_seconds(chip, work, shape.hidden, shape.neurons), passes
    )
    if shape.mixture is not None:
        ffns += sparse * _mixture_seconds(chip, shape, shape.mixture, work, passes)
    return shape.layers * layer + ffns


def _trained_seconds(chip: Chip, work: Work, products: Sequence[tuple[int, int]], vector: float, passes: int) -> float:
    """Return the time of `passes` forward passes and the backward one of some products and element-wise operations."""
    backward = sum(_gradient_seconds(chip, work.rows, n, k, work.precision) for n, k in products)
    return passes * products_seconds(chip, work, products) + backward + (passes + VECTOR_BACKWARD) * vector


def _mixture_seconds(chip: Chip, shape: ModelShape, mixture: Mixture, work: Work, passes: int) -> float:
    """Return the time of the feed-forward block of a layer with experts, forward and backward.

    The gradient of the experts' weights takes as long as their product forward: it moves and multiplies as much.
    """
    rows, read = routed_rows(chip, work, mixture)
    products = mixture_products(work, shape.hidden, mixture)
    forward = mixture_seconds(chip, work, shape.hidden, shape.neurons, mixture)
    beside = [shape.neurons] * mixture.beside + [mixture.shared] * bool(mixture.shared)
    single = [(mixture.experts, shape.hidden)]
    single += [pair for neurons in beside for pair in ffn_products(work, shape.hidden, neurons)]

    def of_experts(pairs: Sequence[tuple[int, int]]) -> float:
        return sum(gemm_seconds(chip, rows, n, k, work.precision, row_major=True, weights=read) for n, k in pairs)

    grouped = of_experts(products)
    backward = grouped + of_experts([(k, n) for n, k in products])
    backward += sum(_gradient_seconds(chip, work.rows, n, k, work.precision) for n, k in single)
    vector = forward - grouped - products_seconds(chip, work, single)
    return passes * forward + backward + VECTOR_BACKWARD * vector


def _writing_seconds(chip: Chip, student: ModelShape, run: Recovery, devices: int) -> float:
    """The prompts, then a pass for each token of the answers; stage 3 gathers the weights for each of them."""
    gathers = run.zero_stage >= 3 and devices > 1
    gather = gather_seconds(chip, student.parameters() * ELEMENT_BYTES[run.precision], devices) if gathers else 0.0
    prompt, middle = run.sequence - run.written, run.sequence - run.written // 2
    read = pass_seconds(chip, student, Work(run.micro_batch, prompt, prompt, run.precision, row_major=True))
    write = pass_seconds(chip, student, Work(run.micro_batch, 1, middle, run.precision, row_major=True))
    return read + gather + (run.written - 1) * (write + gather)


def _loss_seconds(chip: Chip, teacher: ModelShape | None, student: ModelShape, run: Recovery) -> float:
    """Each model's logits, chunk by chunk, the divergence of each, and the gradients of the student's output matrix."""
    chunk = min(run.chunk, run.rows)
    products = sum(
        gemm_seconds(chip, chunk, student.vocabulary, model.hidden, run.precision, row_major=True)
        for model in (student, teacher)
        if model
    )
    gradients = _gradient_seconds(chip, chunk, student.vocabulary, student.hidden, run.precision)
    row = student.vocabulary * 4
    return ceil(run.rows / chunk) * (products + gradients + vector_seconds(chip, LOGIT_PASSES * chunk * row, row))


def _gradient_seconds(chip: Chip, rows: int, n: int, k: int, precision: str) -> float:
    return gemm_seconds(chip, rows, k, n, precision, row_major=True) + gemm_seconds(
        chip, n, k, rows, precision, row_major=True
    )


def _communication_seconds(chip: Chip, own: int, frozen: int, run: Recovery, devices: int, accumulation: int) -> float:
    """Stage 0 sums gradients; 1 scatters them, gathers weights; 2 scatters every micro-batch; 3 gathers there too."""
    size = ELEMENT_BYTES[run.precision]
    gather = gather_seconds(chip, own * size, devices)
    if run.zero_stage == 0:
        return allreduce_seconds(chip, own * size, devices)
    if run.zero_stage == 1:
        return 2 * gather
    if run.zero_stage == 2:
        return (accumulation + 1) * gather
    return accumulation * (3 * gather + gather_seconds(chip, frozen * size, devices))


def _duration(hours: float) -> str:
    """Return a duration in seconds below two minutes, in minutes below two hours, else in hours."""
    for unit, parts in (("seconds", 3600.0), ("minutes", 60.0)):
        if hours * parts < 120.0:
            return f"{_figures(hours * parts)} {unit}"
    return f"{_figures(hours)} hours"


def _figures(value: float) -> str:
    """Three figures, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
