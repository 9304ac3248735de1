"""What evaluations find, as artifacts hold it. A perplexity or loss that is not finite is stored as null."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pipeline.evaluation.perplexity import finite
from pipeline.model.stored import Stored


@dataclass(frozen=True)
class Behaviour:
    """What a model does beside its loss on text."""

    kv_bytes_per_token: int
    tasks: Mapping[str, Mapping[str, float | None]]  # metrics by lm-eval task
    samples: tuple[str, ...]  # continuations of the prompts


@dataclass(frozen=True)
class _Finite(Stored):
    def to_json(self) -> Any:
        """Return the value as JSON holds it, null for every number that is not finite."""
        return finite(asdict(self))


@dataclass(frozen=True)
class ReferenceEvaluation(_Finite):
    """The reference model on every evaluation text: facts of the text, figures of the model; and its behaviour."""

    FILE: ClassVar[str] = "reference.json"

    facts: dict[str, dict[str, int]]
    figures: dict[str, dict[str, Any]]
    behaviour: Behaviour


@dataclass(frozen=True)
class Evaluation(_Finite):
    """Reference (`teacher`), student before recovery (`start`) and student side by side."""

    FILE: ClassVar[str] = "evaluation.json"

    device: dict[str, Any]
    models: dict[str, dict[str, Any]]  # sizes by model
    texts: dict[str, dict[str, Any]]  # facts and figures by text
    tasks: Mapping[str, Mapping[str, Mapping[str, float | None]]]  # metrics by model and task
    speed: dict[str, Any] | None
    samples: tuple[dict[str, str], ...]
