"""Sections of the student's shape: the shape itself, budgets, the search, and the chip that it is designed for."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.config.fields import Count, Folder, Fraction, Portion, Positive, Section, Weight


class Shape(Section):
    layers: Count | None
    hidden: Count | None
    heads: Count | None
    groups: Count | None
    neurons: Count | None
    experts: Count | None
    expert_neurons: Count | None
    shared_neurons: Count | None
    attention_layers: Count | None
    ffn_layers: Count | None

    @property
    def given(self) -> bool:
        return any(value is not None for value in self.model_dump().values())

    @property
    def sublayers(self) -> dict[str, int]:
        """The numbers of layers that keep their attention and their FFN, where set."""
        return self.model_dump(include={"attention_layers", "ffn_layers"}, exclude_none=True)


class Budget(Section):
    parameters: Fraction | None
    total: Fraction | None
    active_parameters: Fraction | None
    bytes: Positive | None
    context: Count | None
    axes: Literal["all", "layers", "neurons", "experts", "sublayers"]
    fallback: Fraction
    vocabulary: Count | None
    speedup: Positive | None
    memory_gb: Positive | None
    decode_rate: Positive | None
    prefill_seconds: Positive | None

    @property
    def sized(self) -> dict[str, float]:
        """The limits of the student's size, where set: of which a run has one."""
        limits = {
            "parameters": self.parameters,
            "total": self.total,
            "active_parameters": self.active_parameters,
            "bytes": self.bytes,
        }
        return {name: value for name, value in limits.items() if value is not None}

    @property
    def predicted(self) -> dict[str, float]:
        """The limits that the chip model predicts, where set."""
        limits = self.model_dump(include={"speedup", "decode_rate", "prefill_seconds"}, exclude_none=True)
        return limits | ({"memory_bytes": self.memory_gb * 1e9} if self.memory_gb else {})

    @property
    def of_tokens_alone(self) -> bool:
        """Whether the vocabulary is all that is limited."""
        return self.vocabulary is not None and not self.sized and not self.predicted

    @property
    def limits(self) -> dict[str, float]:
        """All limits that are set; the fallback where none is."""
        parameters = self.parameters or (None if self.predicted else self.fallback)
        return self.predicted | ({"parameters": parameters} if parameters else {})


class ShapeSearch(Section):
    candidates: Count
    tolerance: Weight
    tokens: Count
    speed: Literal["decode", "prefill"]
    batch_size: Count
    prompt: Count
    context: Count
    precision: Literal["bf16", "fp32", "int8"]
    tensor_parallel: Count

    @property
    def serving(self) -> dict[str, Any]:
        """How the student will be served, without the settings of the search."""
        return self.model_dump(exclude={"candidates", "tolerance", "tokens"})


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
    overlap: Portion
    attention_efficiency: Positive
    link_bandwidth: Positive
    network_bandwidth: Positive
    link_seconds: Weight
    devices_per_node: Count


class Calibrate(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    folder: Folder
    rounds: Count
