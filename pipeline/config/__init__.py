"""The configuration as frozen values, mirroring conf/ field by field; an unknown or ill-typed field is refused."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from .fields import Count, Section
from .inputs import Data, Model
from .methods import Basis, Gates, Plan, Reinit, Restore, Score
from .results import Evaluate, Export, Report, Track
from .shapes import Budget, Calibrate, Chip, Search, Shape
from .training import DeepSpeed, Distill, Settle


class Recipe(Section):
    name: str
    shape: Literal["given", "search"]
    line: list[str]


class Device(Section):
    kind: Literal["auto", "npu", "cuda", "cpu"]
    chip: Chip | None
    attention: Literal["auto", "sdpa", "eager"]
    deterministic: bool
    timeout: Count

    @property
    def chip_facts(self) -> dict[str, Any]:
        """The values of the chip that students are made for; ValueError where none was chosen or found."""
        if self.chip is None:
            raise ValueError("device.chip is null: which chip is the student for? choose one with device/chip=910B3")
        return self.chip.model_dump()


class Config(Section):
    run: Annotated[str, Field(pattern=r"^[\w.+=,-]+(/[\w.+=,-]+)*$")]
    runs: str
    artifacts: str
    stages: list[str] | None
    seed: int
    dry_run: bool
    recipe: Recipe
    model: Model
    data: Data
    shape: Shape
    budget: Budget
    score: Score
    search: Search
    basis: Basis
    restore: Restore
    gates: Gates
    settle: Settle
    plan: Plan
    reinit: Reinit
    distill: Distill
    export: Export
    evaluate: Evaluate
    calibrate: Calibrate
    report: Report
    device: Device
    deepspeed: DeepSpeed
    track: Track

    @property
    def predicts(self) -> bool:
        """Whether anything depends on what the chip model says of the student."""
        return self.dry_run or self.recipe.shape == "search" or bool(self.budget.predicted)

    @model_validator(mode="after")
    def _stages_belong_to_the_recipe(self):
        unknown = [stage for stage in self.stages or [] if stage not in self.recipe.line]
        if unknown:
            raise ValueError(f"stages names {unknown}; recipe {self.recipe.name} has {self.recipe.line}")
        return self

    @model_validator(mode="after")
    def _methods_go_together(self):
        turned = self.basis.kind == "principal"
        if turned and self.plan.channels == "scores":
            raise ValueError(
                "plan.channels=scores takes the teacher's own channels, not those of a principal basis; "
                "set plan.channels=leading"
            )
        if not turned and self.plan.channels == "leading":
            raise ValueError(
                "plan.channels=leading takes the first channels of a principal basis; set basis.kind=principal"
            )
        if turned and (self.distill.loss.hidden or self.distill.loss.embedding):
            raise ValueError(
                "distill.loss.hidden and distill.loss.embedding compare channels with the teacher's, which "
                "basis.kind=principal turns; set both to 0"
            )
        if self.restore.order == "obs" and self.plan.clap:
            raise ValueError(
                "restore.order=obs ranks KV groups inside a layer and plan.clap compares layers; set plan.clap=false "
                "or restore.order=scores"
            )
        if self.settle.norm != "none" and not self.plan.measures_depth:
            raise ValueError(
                f"settle.norm={self.settle.norm} empties the layers that go, which plan.depth={self.plan.depth} "
                "names only in the plan; set plan.depth=gates or loss"
            )
        if self.settle.norm != "none" and (self.restore.outputs or self.restore.order == "obs"):
            raise ValueError(
                "restore.outputs and restore.order=obs solve with the inputs of the teacher's layers, which "
                f"settle.norm={self.settle.norm} changes; set settle.norm=none, or restore.outputs=false and restore.order=scores"
            )
        return self


def validate(values: dict) -> Config:
    """Give the validated configuration of a composed mapping; ValueError with one line a fault, named by its field."""
    try:
        return Config.model_validate(values)
    except ValidationError as fault:
        lines = [
            f"{'.'.join(map(str, each['loc'])) or 'config'}: {each['msg']} (got {each['input']!r:.80})"
            for each in fault.errors()
        ]
        raise ValueError("; ".join(lines)) from None
