"""What is read: the model and the texts."""

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.fields import Count, Portion, Positive, Section, Share

Paths = str | list[str]


class Model(Section):
    path: str
    start: str | None
    trust_remote_code: bool
    allow_pickle: bool


class Source(Section):
    path: Paths
    weights: list[Positive] | None = None

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @model_validator(mode="after")
    def _one_weight_per_path(self):
        if not all(self.paths) or not self.paths:
            raise ValueError("path is empty; give a text, or a list of texts")
        if self.weights is not None and len(self.weights) != len(self.paths):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.paths)} paths; give one each")
        return self


class Split(Section):
    evaluation: Share
    calibration: Share

    @model_validator(mode="after")
    def _leaves_a_rest(self):
        if self.evaluation + self.calibration >= 1.0:
            raise ValueError("evaluation + calibration is 1 or more, which leaves recovery nothing; lower one")
        return self


class Data(Section):
    sequence_length: Annotated[int, Field(ge=8)]
    text_field: str
    calibration: Source
    recovery: Source
    evaluation: Source
    split: Split

    @model_validator(mode="after")
    def _evaluation_is_not_mixed(self):
        if self.evaluation.weights is not None:
            raise ValueError("evaluation.weights has no meaning, as each text is measured by itself; leave it out")
        return self


class SelfGenerate(Section):
    tokens: Count
    length: Count
    batch_size: Count
    temperature: Positive
    chat: Portion


class Calibration(Section):
    batch_size: Count


class Logits(Section):
    chunk: Count
