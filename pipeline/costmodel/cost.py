"""What a decoder costs to serve on a chip: prefill latency, decoded tokens a second, memory, from plain sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from pipeline.costmodel.chip import ELEMENT_BYTES, Chip
from pipeline.costmodel.gemm import allreduce_seconds, gather_seconds, gemm_seconds, vector_seconds
from pipeline.costmodel.mixture import Mixture
from pipeline.costmodel.shapes import ModelShape

MEMORY_SHARE = 0.9  # share of a device's memory that a program can fill; the rest is runtime, buffers, fragments


@dataclass(frozen=True)
class Work:
    """One forward pass: `queries` new tokens for each of `sequences`, each seeing `context` tokens, its own included.

    Logits are wanted for the last token of every sequence. Heads, groups, neurons and vocabulary are split over
    `tensor_parallel` devices. `row_major`: weights as the framework keeps them, not in the chip's tiled format.
    """

    sequences: int
    queries: int
    context: int
    precision: str
    tensor_parallel: int = 1
    row_major: bool = False

    @property
    def rows(self) -> int:
        return self.sequences * self.queries

    @property
    def element(self) -> int:
        return ELEMENT_BYTES[self.precision]


def prefill(batch: int, prompt: int, precision: str, tensor_parallel: int = 1) -> Work:
    """Return the pass that reads `batch` prompts."""
    return Work(batch, prompt, prompt, precision, tensor_parallel)


def decode(batch: int, context: int, precision: str, tensor_parallel: int = 1) -> Work:
    """Return the pass that adds one token to each of `batch` sequences."""
    return Work(batch, 1, context, precision, tensor_parallel)


def attention_products(work: Work, hidden: int, heads: int, groups: int, head_size: int) -> tuple[tuple[int, int], ...]:
    """Return (n, k) of one device's fused QKV and output products; groups fewer than devices are copied."""
    shards = work.tensor_parallel
    queries, keys = ceil(heads / shards) * head_size, ceil(groups / shards) * head_size
    return (queries + 2 * keys, hidden), (hidden, queries)


def ffn_products(work: Work, hidden: int, neurons: int) -> tuple[tuple[int, int], ...]:
    """Return (n, k) of the fused gate and up product and of the down product of one device."""
    share = ceil(neurons / work.tensor_parallel)
    return (2 * share, hidden), (hidden, share)


def products_seconds(chip: Chip, work: Work, products: Sequence[tuple[int, int]]) -> float:
    return sum(gemm_seconds(chip, work.rows, n, k, work.precision, row_major=work.row_major) for n, k in products)


def attention_vector_seconds(chip: Chip, work: Work, hidden: int, heads: int, groups: int, head_size: int) -> float:
    """Time of the residual addition with its norm (two reads, two writes) and of RoPE with the cache's new entries."""
    queries, keys = ceil(heads / work.tensor_parallel), ceil(groups / work.tensor_parallel)
    rotated = (queries + keys) * head_size * work.element
    return _norm_seconds(chip, work, work.rows, hidden) + vector_seconds(
        chip, work.rows * 2 * (rotated + keys * head_size * work.element), rotated
    )


def ffn_vector_seconds(chip: Chip, work: Work, hidden: int, neurons: int) -> float:
    """Time of the residual addition with its norm and of SwiGLU (two reads, one write)."""
    share = ceil(neurons / work.tensor_parallel) * work.element
    return _norm_seconds(chip, work, work.rows, hidden) + vector_seconds(chip, work.rows * 3 * share, share)


def kernel_seconds(chip: Chip, work: Work, heads: int, groups: int, head_size: int) -> float:
    """Time of fused causal attention: its two products at `attention_efficiency`, or all it moves if that takes longer.

    It moves keys, values, queries and outputs. The queries of one group share its keys, so they fill the matrix unit
    together; their number is padded to its edge.
    """
    queries, keys = ceil(heads / work.tensor_parallel), ceil(groups / work.tensor_parallel)
    seen = work.context - (work.queries - 1) / 2  # tokens an average query sees
    together = ceil(work.queries * (queries / keys) / chip.cube_edge) * chip.cube_edge
    macs = 2 * work.sequences * keys * together * seen * head_size
    cube = macs / (chip.cube_cores * chip.macs(work.precision) * chip.attention_efficiency)
    moved = (work.sequences * work.context * 2 * keys + work.rows * 2 * queries) * head_size * work.element
    return chip.launch_seconds + max(cube, moved / (chip.hbm_bandwidth * chip.memory_efficiency))


def attention_seconds(chip: Chip, work: Work, hidden: int, heads: int, groups: int, head_size: int) -> float:
    """Time of one layer's attention block, its sum over tensor-parallel devices included."""
    products = attention_products(work, hidden, heads, groups, head_size)
    return (
        products_seconds(chip, work, products)
        + attention_vector_seconds(chip, work, hidden, heads, groups, head_size)
        + kernel_seconds(chip, work, heads, groups, head_size)
        + allreduce_seconds(chip, work.rows * hidden * work.element, work.tensor_parallel)
    )


def ffn_seconds(chip: Chip, work: Work, hidden: int, neurons: int) -> float:
    """Time of one layer's feed-forward block, its sum over tensor-parallel devices included."""
    return (
        products_seconds(chip, work, ffn_products(work, hidden, neurons))
        + ffn_vector_seconds(chip, work, hidden, neurons)
        + allreduce_seconds(chip, work.rows * hidden * work.element, work.tensor_parallel)
    )


def mixture_products(work: Work, hidden: int, mixture: Mixture) -> tuple[tuple[int, int], ...]:
    """Return (n, k) of the products of one device with the experts' weights, which are split as those of an FFN."""
    return ffn_products(work, hidden, mixture.neurons)


def routed_rows(chip: Chip, work: Work, mixture: Mixture) -> tuple[int, float]:
    """Return the rows of a grouped product of all experts, and how many of these it reads.

    The rows are each token once for each of its experts; every expert but one adds half an edge of the matrix unit, to
    which its own rows are padded.
    """
    read = mixture.read(work.rows)
    return work.rows * mixture.top + round((read - 1.0) * chip.cube_edge / 2), read


def router_seconds(chip: Chip, work: Work, hidden: int, mixture: Mixture) -> float:
    """Time of choosing the experts of each token, and of ordering the rows by expert and adding their outputs."""
    scores = 3 * work.rows * mixture.experts * 4  # in fp32: read for the softmax, written, read for the choice
    ordered = 4 * work.rows * mixture.top * hidden * work.element  # read and written before and after
    return (
        gemm_seconds(chip, work.rows, mixture.experts, hidden, work.precision, row_major=work.row_major)
        + vector_seconds(chip, scores, chip.align_bytes)
        + vector_seconds(chip, ordered, hidden * work.element)
    )


def experts_seconds(chip: Chip, work: Work, hidden: int, mixture: Mixture) -> float:
    """Time of the products of all experts, each with the tokens that are sent to it, and of their activation."""
    rows, read = routed_rows(chip, work, mixture)
    share = ceil(mixture.neurons / work.tensor_parallel) * work.element
    return sum(
        gemm_seconds(chip, rows, n, k, work.precision, row_major=work.row_major, weights=read)
        for n, k in mixture_products(work, hidden, mixture)
    ) + vector_seconds(chip, work.rows * mixture.top * 3 * share, share)


def beside_seconds(chip: Chip, work: Work, hidden: int, neurons: int) -> float:
    """Time of an FFN that every token passes through beside the experts; none where it has no neurons."""
    if not neurons:
        return 0.0
    share = ceil(neurons / work.tensor_parallel) * work.element
    products = products_seconds(chip, work, ffn_products(work, hidden, neurons))
    return products + vector_seconds(chip, work.rows * 3 * share, share)


def mixture_seconds(chip: Chip, work: Work, hidden: int, neurons: int, mixture: Mixture) -> float:
    """Time of the feed-forward block of a layer with experts, its sum over tensor-parallel devices included; `neurons`
    are those of a dense FFN, which count where the layer has one beside the experts."""
    return (
        _norm_seconds(chip, work, work.rows, hidden)
        + router_seconds(chip, work, hidden, mixture)
        + experts_seconds(chip, work, hidden, mixture)
        + beside_seconds(chip, work, hidden, mixture.shared)
        + beside_seconds(chip, work, hidden, neurons if mixture.beside else 0)
        + allreduce_seconds(chip, work.rows * hidden * work.element, work.tensor_parallel)
    )


def ends_seconds(chip: Chip, work: Work, hidden: int, vocabulary: int) -> float:
    """Time of what a pass does once: embeddings; norm, logits and choice for the last token of each sequence."""
    share = ceil(vocabulary / work.tensor_parallel)
    logits = work.sequences * share * work.element
    return (
        vector_seconds(chip, 2 * work.rows * hidden * work.element, hidden * work.element)
        + _norm_seconds(chip, work, work.sequences, hidden)
        + gemm_seconds(chip, work.sequences, share, hidden, work.precision, row_major=work.row_major)
        + vector_seconds(chip, logits, share * work.element)
        + gather_seconds(chip, logits * work.tensor_parallel, work.tensor_parallel)
    )


def pass_seconds(chip: Chip, shape: ModelShape, work: Work) -> float:
    """Time of one forward pass of a whole model."""
    attention = attention_seconds(chip, work, shape.hidden, shape.heads, shape.groups, shape.head_size)
    sparse, dense = shape.mixture.layers(shape.layers) if shape.mixture else (0, shape.layers)
    ffns = dense * ffn_seconds(chip, work, shape.hidden, shape.neurons) if dense else 0.0
    if shape.mixture is not None:
        ffns += sparse * mixture_seconds(chip, work, shape.hidden, shape.neurons, shape.mixture)
    layers = shape.layers * (attention + chip.layer_seconds) + ffns
    return layers + ends_seconds(chip, work, shape.hidden, shape.vocabulary)


def decode_rate(
    chip: Chip, shape: ModelShape, batch: int, context: int, precision: str, tensor_parallel: int = 1
) -> float:
    """Tokens a second that `batch` sequences of `context` tokens gain together."""
    return batch / pass_seconds(chip, shape, decode(batch, context, precision, tensor_parallel))


def cache_bytes(shape: ModelShape, tokens: int, precision: str, tensor_parallel: int = 1) -> int:
    """Bytes of keys and values that `tokens` tokens hold on each device."""
    groups = ceil(shape.groups / tensor_parallel)
    return tokens * shape.layers * 2 * groups * shape.head_size * ELEMENT_BYTES[precision]


def serving_bytes(shape: ModelShape, batch: int, context: int, precision: str, tensor_parallel: int = 1) -> float:
    """Bytes of weights and cache on each device."""
    weights = shape.parameters() * ELEMENT_BYTES[precision] / tensor_parallel
    return weights + cache_bytes(shape, batch * context, precision, tensor_parallel)


def largest_batch(chip: Chip, shape: ModelShape, context: int, precision: str, tensor_parallel: int = 1) -> int:
    """Sequences of `context` tokens whose cache fits beside the weights; 0 where the weights alone do not fit."""
    free = MEMORY_SHARE * chip.hbm_bytes - serving_bytes(shape, 0, context, precision, tensor_parallel)
    return max(0, int(free // cache_bytes(shape, context, precision, tensor_parallel)))


def generation_rate(
    chip: Chip,
    shape: ModelShape,
    requests: Sequence[tuple[int, int]],
    batch: int,
    precision: str,
    tensor_parallel: int = 1,
) -> float:
    """Tokens a second generated when `batch` sequences run at a time and requests (prompt, answer) come equally often.

    Every answer's tokens are decoded at its mean context; time is linear in it.
    """
    seconds = 0.0
    for prompt, answer in requests:
        work = decode(batch, prompt + answer // 2, precision, tensor_parallel)
        seconds += pass_seconds(chip, shape, replace(work, queries=prompt, context=prompt))
        seconds += answer * pass_seconds(chip, shape, work)
    return batch * sum(answer for _, answer in requests) / seconds


def _norm_seconds(chip: Chip, work: Work, rows: int, hidden: int) -> float:
    return vector_seconds(chip, 4 * rows * hidden * work.element, hidden * work.element)
