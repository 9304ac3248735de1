"""How the student recovers, and how whole models are trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

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


class Correct(Training):
    tokens: Size
    chunk: Count


class Distill(Training):
    loss: Loss


OWN = {  # of DeepSpeed's settings: those that say again what these say
    "train_batch_size": "distill.batch",
    "train_micro_batch_size_per_gpu": "distill.micro_batch",
    "gradient_accumulation_steps": "distill.batch and distill.micro_batch",
    "optimizer": "distill.learning_rate, distill.betas and distill.weight_decay",
    "scheduler": "distill.schedule, distill.warmup and distill.floor",
}


class DeepSpeed(Section):
    stage: Literal[0, 1, 2, 3]
    extra: dict[str, Any]

    @model_validator(mode="after")
    def _says_nothing_twice(self):
        for name, ours in OWN.items():
            if name in self.extra:
                others = "(correct's or settle's where they train)"
                raise ValueError(f"extra.{name} would say again what {ours} says {others}; set that")
        return self
