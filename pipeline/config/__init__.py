"""The configuration as frozen values, mirroring conf/ field by field; an unknown or ill-typed field is refused."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PrivateAttr, ValidationError, model_validator

from pipeline.config.fields import Count, Section, Seed
from pipeline.config.inputs import Calibration, Data, Logits, Model, SelfGenerate
from pipeline.config.methods import LayerGates, LayerLoss, Plan, Reinit, Restore, Rotate, Score, Sensitivity, Supernet
from pipeline.config.results import Checkpoint, Evaluate, Export, Report, Track
from pipeline.config.shapes import Budget, Calibrate, Chip, Shape, ShapeSearch
from pipeline.config.training import DeepSpeed, Distill, LocalDistill, Regularize, TeacherCorrection


class Recipe(Section):
    name: str
    shape: Literal["given", "search"]
    stages: list[str]
    rounds: Count
    repeat: list[str]
    _round: int | None = PrivateAttr(default=None)  # no setting: where the line is

    @property
    def part(self) -> tuple[int, int]:
        """Which round of how many the line is in; (1, 1) outside the rounds: the whole way."""
        return (self._round, self.rounds) if self._round else (1, 1)

    @property
    def progress(self) -> dict[str, int]:
        """The part, for the settings of stages that go a part of the way; empty where it is all of it."""
        return {} if self.part == (1, 1) else dict(zip(("round", "rounds"), self.part, strict=True))


class Device(Section):
    kind: Literal["auto", "npu", "cuda", "cpu"]
    chip: Chip | None
    attention: Literal["auto", "sdpa", "eager"]
    deterministic: bool
    layer_streaming: Literal["auto"] | bool
    timeout: Count

    @property
    def chip_facts(self) -> dict[str, Any]:
        """The values of the chip that students are made for; ValueError where none was chosen or found."""
        if self.chip is None:
            raise ValueError("device.chip is null: which chip is the student for? choose one with device/chip=910B3")
        return self.chip.model_dump()


def _named(run: str) -> str:
    if not re.fullmatch(r"[\w.+=,-]+(/[\w.+=,-]+)*", run) or not all(part.strip(".") for part in run.split("/")):
        told = "give letters, digits and . _ + = , - between /, no part of dots alone"
        raise ValueError(f"{run!r} names no folder; {told}")
    return run


class Config(Section):
    run: Annotated[str, AfterValidator(_named)]
    runs: str
    artifacts: str
    verify: Literal["full", "size"]
    output: str | None
    stages: list[str] | None
    seed: Seed
    dry_run: bool
    recipe: Recipe
    model: Model
    data: Data
    self_generate: SelfGenerate
    teacher_correction: TeacherCorrection
    calibration: Calibration
    logits: Logits
    checkpoint: Checkpoint
    shape: Shape
    budget: Budget
    score: Score
    shape_search: ShapeSearch
    rotate: Rotate
    restore: Restore
    supernet: Supernet
    layer_loss: LayerLoss
    layer_gates: LayerGates
    regularize: Regularize
    sensitivity: Sensitivity
    plan: Plan
    reinit: Reinit
    local_distill: LocalDistill
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

    @property
    def corrects(self) -> bool:
        """Whether the teacher is corrected before it teaches."""
        return self.teacher_correction.tokens > 0 and "teacher_correction" in self.recipe.stages

    def at_round(self, number: int) -> "Config":
        """Give the same configuration in a round of the line."""
        recipe = self.recipe.model_copy()
        recipe._round = number
        return self.model_copy(update={"recipe": recipe})

    @model_validator(mode="after")
    def _rounds_repeat_what_can_be_repeated(self):
        if self.recipe.rounds == 1:
            return self
        strange = [name for name in self.recipe.repeat if name not in self.recipe.stages]
        if strange or not self.recipe.repeat:
            raise ValueError(
                f"recipe.repeat names {strange or 'nothing'}; choose from recipe.stages {self.recipe.stages}"
            )
        if self.recipe.shape == "search":
            raise ValueError("recipe.rounds goes to a known shape in equal parts; set recipe.shape=given")
        if self.rotate.kind != "none":
            raise ValueError(
                f"recipe.rounds={self.recipe.rounds} tells what was cut in the teacher's own channels, which "
                f"rotate.kind={self.rotate.kind} turns; set rotate.kind=none, or recipe.rounds=1"
            )
        return self

    @model_validator(mode="after")
    def _stages_belong_to_the_recipe(self):
        unknown = [stage for stage in self.stages or [] if stage not in self.recipe.stages]
        if unknown:
            raise ValueError(f"stages names {unknown}; recipe {self.recipe.name} has {self.recipe.stages}")
        return self

    @model_validator(mode="after")
    def _methods_go_together(self):
        turned = self.rotate.kind == "principal"
        if turned and self.plan.channels == "scores":
            raise ValueError(
                "plan.channels=scores takes the teacher's own channels, not those of a principal basis; "
                "set plan.channels=leading"
            )
        if not turned and self.plan.channels == "leading":
            raise ValueError(
                "plan.channels=leading takes the first channels of a principal basis; set rotate.kind=principal"
            )
        if turned and (self.distill.loss.hidden or self.distill.loss.embedding):
            raise ValueError(
                "distill.loss.hidden and distill.loss.embedding compare channels with the teacher's, which "
                "rotate.kind=principal turns; set both to 0"
            )
        if self.restore.order == "obs" and self.plan.clap:
            raise ValueError(
                "restore.order=obs ranks KV groups inside a layer and plan.clap compares layers; set plan.clap=false "
                "or restore.order=scores"
            )
        if self.regularize.norm != "none" and not self.plan.measures_depth:
            raise ValueError(
                f"regularize.norm={self.regularize.norm} empties the layers that go, "
                f"which plan.depth={self.plan.depth} names only in the plan; set plan.depth=gates, loss or evolved"
            )
        if self.regularize.norm != "none" and (self.restore.outputs or self.restore.order == "obs"):
            raise ValueError(
                "restore.outputs and restore.order=obs solve with the inputs of the teacher's layers, which "
                f"regularize.norm={self.regularize.norm} changes; set regularize.norm=none, or "
                "restore.outputs=false and restore.order=scores"
            )
        if self.reinit.absorb in ("fitted", "removed") and "absorb_norms" not in self.recipe.stages:
            raise ValueError(
                f"recipe.stages has no absorb_norms, which reinit.absorb={self.reinit.absorb} needs; add it after "
                "cut, or set reinit.absorb=false"
            )
        changes = {
            "restore.sequential=true": self.restore.sequential,
            "plan.widths=evolved": self.plan.widths == "evolved",
            f"regularize.norm={self.regularize.norm}": self.regularize.norm != "none",
        }
        if turned and self.local_distill.epochs and any(changes.values()):
            raise ValueError(
                f"local_distill.epochs={self.local_distill.epochs} lets FFNs learn from the teacher in the axes of "
                f"rotate.kind=principal, which turns a model that "
                f"{next(name for name in changes if changes[name])} has changed; "
                "set local_distill.epochs=0, or rotate.kind=none and plan.channels=scores"
            )
        layerwise = "restore.sequential=true" if self.restore.sequential else "plan.widths=evolved"
        if self.restore.sequential or self.plan.widths == "evolved":
            clashes = {
                "plan.clap=false": self.plan.clap,
                "plan.heads=scores": self.plan.heads != "scores",
                "plan.neurons=scores": self.plan.neurons != "scores",
                "restore.outputs=false": self.restore.outputs,
                "restore.order=scores": self.restore.order != "scores",
                "regularize.norm=none": self.regularize.norm != "none",
            }
            if any(clashes.values()):
                wanted = ", ".join(change for change, clash in clashes.items() if clash)
                raise ValueError(f"{layerwise} chooses heads and neurons and solves what stays by itself; set {wanted}")
        return self


def validate(values: dict) -> Config:
    """Give the validated configuration of a composed mapping; ValueError with one line a fault, named by its field."""
    try:
        return Config.model_validate(values)
    except ValidationError as fault:
        raise ValueError("; ".join(map(_line, fault.errors()))) from None


def _line(fault: Mapping[str, Any]) -> str:
    """Give one of pydantic's faults as a line; a rule of ours says itself what was wrong, and of which fields."""
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "value_error":
        return f"{place}: {fault['ctx']['error']}" if place else str(fault["ctx"]["error"])
    return f"{place}: {fault['msg']} (got {fault['input']!r:.80})"
