"""What training holds on a device: weights, gradients and optimizer, and what a token leaves for the backward pass."""

from pipeline.costmodel.chip import ELEMENT_BYTES
from pipeline.costmodel.shapes import ModelShape


def state_bytes(own: int, frozen: int, precision: str, stage: int, devices: int) -> dict[str, float]:
    """Return the bytes on one device of parameters that are trained, `own`, and of a teacher's, by purpose.

    The optimizer holds an fp32 copy and two moments (12 bytes a parameter) and in bf16 the fp32 gradient of its part at
    the step (4); plain fp32 without ZeRO needs no copy (8). Stage 3 shares out both models' weights, also while it
    starts, when one parameter at a time is whole.
    """
    size = ELEMENT_BYTES[precision]
    optimizer = 16 if precision != "fp32" else 12 if stage else 8
    return {
        "weights": own * size / (devices if stage >= 3 else 1),
        "gradients": own * size / (devices if stage >= 2 else 1),
        "optimizer": own * optimizer / (devices if stage >= 1 else 1),
        "teacher": frozen * size / (devices if stage >= 3 else 1),
    }


def activation_bytes(shape: ModelShape, precision: str, checkpointing: bool) -> int:
    """Bytes a token leaves behind for the backward pass of all layers, exact for the Llama of transformers with SDPA.

    A layer keeps, of each norm, the fp32 input, its normalised form and the output; queries, keys, values, attention's
    output and its fp32 log-sum; gate, activated gate, up and their product; two fp32 scales. A layer with experts keeps
    those of each expert of a token, the token's row and output for each, and the router's scores (inferred). With
    checkpointing every layer keeps its input alone and one is whole while it is recomputed. Fused norms keep less.
    """
    size, mixture = ELEMENT_BYTES[precision], shape.mixture
    attention = (
        2 * shape.hidden * (4 + 2 * size)
        + size * (2 * shape.heads + 2 * shape.groups) * shape.head_size
        + 4 * shape.heads
        + 8
    )
    sparse, dense = mixture.layers(shape.layers) if mixture else (0, shape.layers)
    ffns = [size * 4 * shape.neurons] * bool(dense)
    if mixture is not None:  # scores and weights of the router; each token's row and output, once for each expert
        routed = 4 * 2 * mixture.experts + 2 * size * mixture.top * shape.hidden
        ffns.append(size * 4 * used_neurons(shape) + routed)
    if checkpointing:
        return shape.layers * size * shape.hidden + attention + max(ffns)
    return shape.layers * attention + dense * ffns[0] + (sparse * ffns[-1] if mixture else 0)


def used_neurons(shape: ModelShape) -> int:
    """Return the FFN neurons that a token passes through in a layer: of experts, those that it is sent to."""
    if shape.mixture is None:
        return shape.neurons
    used = shape.mixture.top * shape.mixture.neurons + shape.mixture.shared
    return used + (shape.neurons if shape.mixture.beside else 0)
