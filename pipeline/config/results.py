"""Sections of results: checkpoints, export, evaluation, report, tracking."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import Count, Positive, Section, Size


class Export(Section):
    form: Literal["auto", "own", "padded", "decilm"]
    dtype: Literal["bfloat16", "float16", "float32"]
    tolerance: Positive
    gguf: Literal["f32", "f16", "bf16", "q8_0"] | None
    gguf_converter: str


class Evaluate(Section):
    tokens: Count
    batch_size: Count
    words: Size
    words_context: Count
    answers: Size
    answer_tokens: Count
    draft: bool
    tasks: list[str] | str
    presets: dict[str, list[str]]
    apply_chat_template: Literal["auto"] | bool
    task_backend: Literal["transformers", "vllm"]
    vllm_python: str | None
    vllm_args: dict[str, Any] | None
    speed: bool
    speed_prefill: Count
    speed_decode: Count
    speed_repeats: Count

    @property
    def task_names(self) -> list[str]:
        """The tasks, those of a preset by its name."""
        return self.presets[self.tasks] if isinstance(self.tasks, str) else self.tasks

    @property
    def templated(self) -> bool:
        """Whether the questions of tasks are turns of the model's chat template."""
        return self.tasks == "chat" if self.apply_chat_template == "auto" else self.apply_chat_template

    @model_validator(mode="after")
    def _names_a_preset(self):
        if isinstance(self.tasks, str) and self.tasks not in self.presets:
            raise ValueError(
                f"tasks is {self.tasks!r}, which is no preset; choose from {', '.join(self.presets)}, or give a list "
                f"of tasks: [{self.tasks}]"
            )
        return self


class Report(Section):
    samples: Annotated[int, Field(ge=0, le=1000)]
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
