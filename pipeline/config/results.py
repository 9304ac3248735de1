"""Sections of results: checkpoints, export, evaluation, report, tracking."""

from typing import Literal

from pipeline.config.fields import Count, Positive, Section, Size


class Export(Section):
    form: Literal["auto", "own", "padded", "decilm"]
    dtype: Literal["bfloat16", "float16", "float32"]
    tolerance: Positive


class Evaluate(Section):
    tokens: Count
    batch_size: Count
    words: Size
    words_context: Count
    answers: Size
    answer_tokens: Count
    draft: bool
    tasks: list[str]
    speed: bool
    speed_prefill: Count
    speed_decode: Count
    speed_repeats: Count


class Report(Section):
    samples: Size
    sample_prompt: Count
    sample_tokens: Count


class Track(Section):
    tool: Literal["wandb", "tensorboard", "mlflow"]
    mode: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


class Checkpoint(Section):
    shard_bytes: Positive
