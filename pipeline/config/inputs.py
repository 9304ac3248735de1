"""Sections of what is read: the model and the texts."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import Count, Portion, Positive, Section, Share

Paths = str | list[str]


class Model(Section):
    path: str
    start: str | None
    trust_remote_code: bool
    allow_pickle: bool


class Texts(Section):
    path: Paths

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @model_validator(mode="after")
    def _names_a_text(self):
        if not all(self.paths) or not self.paths:
            raise ValueError("path is empty; give a text or a list of texts")
        return self


class WeightedTexts(Texts):
    weights: list[Positive] | None

    @model_validator(mode="after")
    def _one_weight_per_path(self):
        if self.weights is not None and len(self.weights) != len(self.paths):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.paths)} paths; give one per path")
        return self


class Split(Section):
    evaluation: Share
    calibration: Share

    @model_validator(mode="after")
    def _leaves_a_rest(self):
        if self.evaluation + self.calibration >= 1.0:
            raise ValueError("evaluation + calibration is 1 or more, which leaves no text for recovery; lower one")
        return self


class Data(Section):
    sequence_length: Annotated[int, Field(ge=8)]
    text_field: str
    loss_on: Literal["all", "assistant"]
    calibration: WeightedTexts
    recovery: WeightedTexts
    evaluation: Texts
    split: Split

    @property
    def answers(self) -> bool:
        """Whether the assistant's text in chats is marked."""
        return self.loss_on == "assistant"


class SelfGenerate(Section):
    form: Literal["text", "messages"]
    tokens: Count
    length: Count
    batch_size: Count
    temperature: Positive
    chat: Portion


class Calibration(Section):
    batch_size: Count


class Logits(Section):
    chunk: Count
