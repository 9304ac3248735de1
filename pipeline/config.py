"""The configuration as frozen values, mirroring conf/ field by field; an unknown or ill-typed field is refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Paths = str | list[str]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Section):
    name: str
    shape: Literal["given", "search"]
    line: list[str]


class Model(Section):
    path: str
    trust_remote_code: bool
    allow_pickle: bool


class Source(Section):
    path: Paths
    weights: list[Annotated[float, Field(gt=0.0)]] | None = None

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
    sequence: Annotated[int, Field(ge=8)]
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


class Shape(Section):
    layers: Count | None
    hidden: Count | None
    heads: Count | None
    groups: Count | None
    neurons: Count | None

    @property
    def given(self) -> bool:
        return any(value is not None for value in self.model_dump().values())


class Budget(Section):
    parameters: Fraction | None
    fallback: Fraction
    speedup: Positive | None
    memory_gb: Positive | None
    decode_rate: Positive | None
    prefill_seconds: Positive | None

    @property
    def predicted(self) -> dict[str, float]:
        """The limits that only the chip model can keep to, those that are set."""
        limits = self.model_dump(include={"speedup", "decode_rate", "prefill_seconds"}, exclude_none=True)
        return limits | ({"memory_bytes": self.memory_gb * 1e9} if self.memory_gb else {})

    @property
    def limits(self) -> dict[str, float]:
        """All limits that are set; where none is, the fallback."""
        parameters = self.parameters or (None if self.predicted else self.fallback)
        return self.predicted | ({"parameters": parameters} if parameters else {})


class Score(Section):
    tokens: Count
    batch: Count
    aggregation: Literal["sum", "minitron"]
    norms: Literal["all", "pre"]


class Search(Section):
    candidates: Count
    tolerance: Weight
    tokens: Count
    speed: Literal["decode", "prefill"]
    batch: Count
    prompt: Count
    context: Count
    precision: Literal["bf16", "fp32", "int8"]
    tensor_parallel: Count

    @property
    def serving(self) -> dict[str, int | str]:
        """How the student will be used, without how it is searched for."""
        return self.model_dump(exclude={"candidates", "tolerance", "tokens"})


class Basis(Section):
    kind: Literal["none", "principal"]
    tie: Literal["untied", "keep"]
    own_axes: Annotated[int, Field(ge=0)]
    tokens: Count


class Restore(Section):
    outputs: bool
    order: Literal["scores", "obs"]
    damping: Positive
    at_once: Count
    tokens: Count
    memory: Positive


class Plan(Section):
    depth: Literal["influence", "contiguous", "last", "loss"]
    depth_tokens: Count
    keep_first: Annotated[int, Field(ge=1)]
    clap: bool
    clap_normalise: bool
    channels: Literal["activation", "leading", "random"]
    heads: Literal["activation", "random"]
    neurons: Literal["activation", "random"]

    @property
    def policy(self) -> dict[str, Any]:
        """How layers, heads, neurons and channels are chosen by scores; `drawn` are the kinds chosen at random.

        Block influence stands in for a loss until that is measured.
        """
        drawn = [kind for kind in ("channels", "heads", "neurons") if getattr(self, kind) == "random"]
        depth = "influence" if self.depth == "loss" else self.depth
        asked = self.model_dump(exclude={"channels", "heads", "neurons", "depth_tokens"})
        return asked | {"depth": depth, "drawn": drawn}


class Reinit(Section):
    slnp: bool
    gain_compensation: bool
    absorb: Literal["auto", False]
    absorb_tokens: Count


class Loss(Section):
    kind: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: Annotated[float, Field(gt=0.0, lt=1.0)]
    temperature: Annotated[float, Field(gt=0.0)]
    cross_entropy: Weight
    hidden: Weight
    embedding: Weight
    chunk: Count


class Distill(Section):
    tokens: Count
    batch: Count
    micro_batch: Count
    learning_rate: Annotated[float, Field(gt=0.0)]
    schedule: Literal["cosine", "constant_decay"]
    warmup: Share
    floor: Annotated[float, Field(ge=0.0, le=1.0)]
    betas: tuple[float, float]
    weight_decay: Weight
    clip: Annotated[float, Field(gt=0.0)]
    precision: Literal["auto", "bf16", "fp32"]
    gradient_checkpointing: bool
    save_every: Count
    keep: Count
    validate_every: Count
    validate_tokens: Count
    loss: Loss


class Export(Section):
    dtype: Literal["bfloat16", "float16", "float32"]
    shard_bytes: Annotated[float, Field(gt=0)]
    tolerance: Annotated[float, Field(gt=0)]


class Evaluate(Section):
    tokens: Count
    batch: Count
    chunk: Count
    words: Annotated[int, Field(ge=0)]
    words_context: Count
    tasks: list[str]
    speed: bool
    speed_prefill: Count
    speed_decode: Count
    speed_repeats: Count


class Report(Section):
    samples: Annotated[int, Field(ge=0)]
    sample_prompt: Count
    sample_tokens: Count


class Chip(Section):
    name: str
    kind: Literal["npu", "cuda", "cpu"]
    cube_cores: Count
    vector_cores: Count
    megahertz: Positive
    macs_bf16: Positive
    macs_fp32: Positive
    macs_int8: Positive
    cube_edge: Count
    tiles: list[tuple[Count, Count]]
    l0a_bytes: Count
    l0b_bytes: Count
    l0c_bytes: Count
    l1_bytes: Count
    ub_bytes: Count
    hbm_bytes: Positive
    hbm_bandwidth: Positive
    l2_bandwidth: Positive
    vector_bandwidth: Positive
    core_bandwidth: Positive
    core_l2_bytes: Positive
    align_bytes: Count
    block_bytes: Count
    block_share: Fraction
    ragged_share: Fraction
    vector_ragged_share: Fraction
    row_major_factor: Annotated[float, Field(ge=1.0)]
    row_major_ragged_factor: Annotated[float, Field(ge=1.0)]
    launch_seconds: Weight
    layer_seconds: Weight
    cube_efficiency: Positive
    memory_efficiency: Positive
    overlap: Annotated[float, Field(ge=0.0, le=1.0)]
    attention_efficiency: Positive
    link_bandwidth: Positive
    network_bandwidth: Positive
    link_seconds: Weight
    devices_per_node: Count


class Calibrate(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    folder: str
    rounds: Count


class Device(Section):
    kind: Literal["auto", "npu", "cuda", "cpu"]
    chip: Chip
    attention: Literal["auto", "sdpa", "eager"]
    deterministic: bool
    timeout: Count


class DeepSpeed(Section):
    stage: Literal[0, 1, 2, 3]
    extra: dict[str, Any]


class Track(Section):
    mode: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


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

    @model_validator(mode="after")
    def _stages_belong_to_the_recipe(self):
        unknown = [stage for stage in self.stages or [] if stage not in self.recipe.line]
        if unknown:
            raise ValueError(f"stages names {unknown}; recipe {self.recipe.name} has {self.recipe.line}")
        return self

    @model_validator(mode="after")
    def _methods_go_together(self):
        turned = self.basis.kind == "principal"
        if turned and self.plan.channels == "activation":
            raise ValueError(
                "plan.channels=activation scores the teacher's own channels, not those of a principal basis; "
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
