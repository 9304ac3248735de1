"""The configuration as frozen values that mirror conf/ setting by setting; this package imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError

from pipeline.config import names
from pipeline.config.fields import Count, Folder, Section, Seed
from pipeline.config.inputs import Calibration, Data, Logits, Model, SelfGenerate
from pipeline.config.methods import (
    LayerGates,
    LayerLoss,
    Plan,
    Reinit,
    Restore,
    Rotate,
    Score,
    Sensitivity,
    Sublayers,
    Supernet,
)
from pipeline.config.results import Checkpoint, Evaluate, Export, Report, Track
from pipeline.config.rules import RULES
from pipeline.config.schema import plain, settings_of
from pipeline.config.shapes import Budget, Calibrate, Chip, Shape, ShapeSearch
from pipeline.config.training import DeepSpeed, Distill, LocalDistill, OnPolicy, Regularize, TeacherCorrection

LONGEST_NAME = 200  # bytes of a folder's name; file systems allow 255, and temporary names are longer


class Recipe(Section):
    name: str
    reason: str | None
    shape: Literal["given", "search"]
    stages: list[str]
    rounds: Count
    repeat: list[str]
    _round: int | None = PrivateAttr(default=None)  # no setting: the current round

    @property
    def part(self) -> tuple[int, int]:
        """The current round and the number of rounds, from 1; (1, 1) before and after the rounds."""
        return (self._round, self.rounds) if self._round else (1, 1)

    @property
    def progress(self) -> dict[str, int]:
        """The current round, for the settings of stages whose result depends on it; empty outside rounds."""
        return {} if self.part == (1, 1) else dict(zip(("round", "rounds"), self.part, strict=True))


class Device(Section):
    kind: Literal["auto", "npu", "cuda", "cpu"]
    chip: Chip | None
    attention: Literal["auto", "sdpa", "eager"]
    kernels: Literal["auto", "reference"]
    deterministic: bool
    layer_streaming: Literal["auto"] | bool
    timeout: Annotated[int, Field(ge=1, le=999_999)]  # seconds

    @property
    def chip_facts(self) -> dict[str, Any]:
        """The values of the chip that students are designed for. Raise ValueError where there is none."""
        if self.chip is None:
            raise ValueError("device.chip: null, but the chip model is needed; choose a chip, e.g. device/chip=910B3")
        return self.chip.model_dump()


def _run_name(run: str) -> str:
    parts = run.split("/")
    if not run.isprintable() or not all(part.strip(". ") and part == part.strip() for part in parts):
        raise ValueError(
            f"{run!r} names no folder; use printable characters, / between parts, and no part that is empty, of dots "
            "alone, or with blanks around it"
        )
    if any(len(part.encode()) > LONGEST_NAME for part in parts):
        raise ValueError(f"{run!r} is too long for a file system; use at most {LONGEST_NAME} bytes between /")
    return run


class Config(Section):
    run: Annotated[str, AfterValidator(_run_name)]
    runs: Folder
    artifacts: Folder
    verify: Literal["full", "size"]
    output: Folder | None
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
    sublayers: Sublayers
    regularize: Regularize
    sensitivity: Sensitivity
    plan: Plan
    reinit: Reinit
    local_distill: LocalDistill
    distill: Distill
    onpolicy: OnPolicy
    export: Export
    evaluate: Evaluate
    calibrate: Calibrate
    report: Report
    device: Device
    deepspeed: DeepSpeed
    track: Track

    @property
    def predicts(self) -> bool:
        """Whether a result depends on the chip model's predictions."""
        return self.dry_run or self.recipe.shape == "search" or bool(self.budget.predicted)

    @property
    def removes_sublayers(self) -> bool:
        """Whether layers lose their attention or their FFN alone."""
        return self.budget.axes == "sublayers" or bool(self.shape.sublayers)

    @property
    def corrects(self) -> bool:
        """Whether the teacher is trained on the recovery text before distillation (teacher correction)."""
        return self.teacher_correction.tokens > 0 and "teacher_correction" in self.recipe.stages

    def at_round(self, number: int) -> "Config":
        """Return the same configuration in a round of the recipe, from 1."""
        recipe = self.recipe.model_copy()
        recipe._round = number
        return self.model_copy(update={"recipe": recipe})


SETTINGS = settings_of(Config)  # dotted key -> type of every setting


def unknown_key(key: str) -> str:
    """Return the line that refuses a key that is no setting, with the setting that it most likely means."""
    return names.unknown_key(key, SETTINGS)


def validate(values: dict[str, Any]) -> Config:
    """Return the configuration of a composed mapping.

    Raise ValueError with one line, "setting: what is wrong; what to do", for each setting that is unknown, missing or
    out of range; where all are sound, for the first rule that they break together.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
        own = [fault for fault in faults if not _copied(fault, faults)]
        raise ValueError(". ".join(plain(own, Config, unknown_key))) from None
    for rule in RULES:
        rule(config)
    return config


def _copied(fault: Mapping[str, Any], faults: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a fault repeats one of `distill`, whose values the other training sections take by default."""
    section, *rest = fault["loc"]
    original = ("distill", *rest)
    return section in ("teacher_correction", "regularize", "onpolicy") and any(
        other["loc"] == original and str(other["input"]) == str(fault["input"]) for other in faults
    )
