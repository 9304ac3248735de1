"""Sections of the methods before recovery: scores, choices and changes of weights."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.config.fields import Count, Fraction, Portion, Positive, Section, Size, Weight


class Score(Section):
    kind: str  # a registered score, see prune/importance
    tokens: Count
    aggregation: Literal["sum", "minitron"]
    norms: Literal["all", "pre"]
    experts: str  # a registered score, see prune/importance/experts.py


class Rotate(Section):
    kind: Literal["none", "principal"]
    tie: Literal["untied", "keep"]
    own_axes: Size
    tokens: Count


class Restore(Section):
    outputs: bool
    order: Literal["scores", "obs"]
    damping: Positive
    at_once: Count
    tokens: Count
    memory: Positive
    sequential: bool
    local: str


class Supernet(Section):
    rounds: Count
    granularity: Fraction
    steps: Count
    multiple: Count
    accumulation: bool
    generations: Size
    offspring: Count
    swaps: Count
    tokens: Annotated[list[Count], Field(min_length=1)]
    survivors: Annotated[list[Count], Field(min_length=1)]
    weights: Literal["composed", "solved_again", "better"]


class LayerLoss(Section):
    start: Literal["influence", "loss"]
    generations: Size
    offspring: Count


class Sublayers(Section):
    score: Literal["kl", "kl_per_size"]
    candidates: Count | None


class LayerGates(Section):
    form: Literal["residual", "stream"]
    penalty: Weight
    learning_rate: Positive
    tokens: Count
    batch_size: Count
    guard: Annotated[float, Field(ge=1.0)] | None


class Sensitivity(Section):
    levels: Annotated[list[Fraction], Field(min_length=1)]
    length: Count
    restored: bool


MEASURED_DEPTH = ("loss", "evolved", "gates")  # depth policies of the stages layer_loss and layer_gates


class Plan(Section):
    depth: str
    depth_tokens: Count
    keep_first: Count
    clap: bool
    clap_normalise: bool
    channels: Literal["scores", "leading", "random"]
    heads: Literal["scores", "random"]
    neurons: Literal["scores", "random"]
    experts: Literal["scores", "random", "merge"]
    widths: str
    amplitude: Portion
    steps: Count

    @property
    def measures_depth(self) -> bool:
        """Whether a stage before the plan chooses the layers to keep."""
        return self.depth in MEASURED_DEPTH

    @property
    def policy(self) -> dict[str, Any]:
        """How scores select layers, heads, neurons, channels and experts; `drawn`: the kinds chosen at random.

        The depth policy is block influence until a loss has been measured or gates have been learned.
        """
        drawn = [kind for kind in ("channels", "heads", "neurons", "experts") if getattr(self, kind) == "random"]
        depth = "influence" if self.measures_depth else self.depth
        options = self.model_dump(include={"keep_first", "clap", "clap_normalise"})
        return options | {"depth": depth, "drawn": drawn}


class Reinit(Section):
    slnp: bool
    gain_compensation: bool
    absorb: Literal["auto", "fitted", "removed", False]
    absorb_tokens: Count
    bias_compensation: bool
    bypass: bool
    bypass_tokens: Count
