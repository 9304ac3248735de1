"""How the student recovers, and how whole models are trained."""

from typing import Annotated, Any, Literal

from pydantic import Field

from .fields import Count, Portion, Positive, Section, Share, Size, Weight


class Blocks(Section):
    epochs: Size
    tokens: Count
    batch: Count
    learning_rate: Positive


class Loss(Section):
    kind: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: Annotated[float, Field(gt=0.0, lt=1.0)]
    temperature: Positive
    cross_entropy: Weight
    hidden: Weight
    embedding: Weight
    chunk: Count
    kernel: Literal["auto", "reference", "triton"]


class Training(Section):
    tokens: Count
    batch: Count
    micro_batch: Count
    learning_rate: Positive
    schedule: Literal["cosine", "constant_decay"]
    warmup: Share
    floor: Portion
    betas: tuple[Share, Share]
    weight_decay: Weight
    clip: Positive
    precision: Literal["auto", "bf16", "fp32"]
    gradient_checkpointing: bool
    save_every: Count
    keep: Count
    validate_every: Count
    validate_tokens: Count


class Settle(Training):
    norm: Literal["none", "l1", "l2"]
    weight: Weight
    chunk: Count


class Distill(Training):
    loss: Loss


class DeepSpeed(Section):
    stage: Literal[0, 1, 2, 3]
    extra: dict[str, Any]
