"""Sections of training: local distillation, teacher correction, regularization and recovery."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import Count, Portion, Positive, Section, Share, Size, Weight


class LocalDistill(Section):
    epochs: Size
    tokens: Count
    batch_tokens: Count
    learning_rate: Positive


class Loss(Section):
    kind: str  # a name in pipeline/distill/divergences.py; the stage distill refuses others
    beta: Annotated[float, Field(gt=0.0, lt=1.0)]
    temperature: Positive
    cross_entropy: Weight
    hidden: Weight
    embedding: Weight
    kernel: Literal["auto", "autograd", "reference", "triton"]


class Training(Section):
    tokens: Count
    max_steps: Count | None
    global_batch_size: Count
    micro_batch_size: Count
    learning_rate: Positive
    lr_scheduler: Literal["cosine", "wsd"]
    warmup_ratio: Share
    min_lr_ratio: Portion
    adam_betas: tuple[Share, Share]
    weight_decay: Weight
    max_grad_norm: Positive
    precision: Literal["auto", "bf16", "fp32"]
    gradient_checkpointing: bool
    save_steps: Count
    save_total_limit: Count
    eval_steps: Count
    eval_tokens: Count


class Regularize(Training):
    norm: Literal["none", "l1", "l2"]
    weight: Weight


class TeacherCorrection(Training):
    tokens: Size


class Distill(Training):
    select: Literal["best", "last"]
    patience: Count | None
    loss: Loss


class OnPolicy(Training):
    tokens: Size
    prompt_tokens: Count
    min_new_tokens: Count
    max_new_tokens: Count
    temperature: Weight
    divergence: str  # a name in pipeline/distill/divergences.py
    mix: Annotated[float, Field(gt=0.0, lt=1.0)]
    select: Literal["best", "last"]
    patience: Count | None

    @model_validator(mode="after")
    def _grows(self):
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens ({self.max_new_tokens}); answers "
                "grow during the training, so lower it or raise max_new_tokens"
            )
        return self


OWN = {  # DeepSpeed settings that the pipeline writes itself, and the settings they come from
    "train_batch_size": "distill.global_batch_size",
    "train_micro_batch_size_per_gpu": "distill.micro_batch_size",
    "gradient_accumulation_steps": "distill.global_batch_size and distill.micro_batch_size",
    "optimizer": "distill.learning_rate, distill.adam_betas and distill.weight_decay",
    "scheduler": "distill.lr_scheduler, distill.warmup_ratio and distill.min_lr_ratio",
}


class DeepSpeed(Section):
    stage: Literal[0, 1, 2, 3]
    extra: dict[str, Any]

    @model_validator(mode="after")
    def _says_nothing_twice(self):
        for name, ours in OWN.items():
            if name in self.extra:
                raise ValueError(
                    f"extra.{name} is written by the pipeline; set {ours} instead "
                    "(of teacher_correction, regularize or onpolicy where these train)"
                )
        return self
