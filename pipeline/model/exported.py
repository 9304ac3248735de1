"""What an exported student is, as its folder holds it."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from pipeline.model.stored import Stored


@dataclass(frozen=True)
class Exported(Stored):
    """The form of a student, and the check that it loads elsewhere with the logits of the recovered student."""

    FILE: ClassVar[str] = "export.json"

    architecture: Annotated[str, Field(alias="class")]
    generated: int | None  # tokens that the loaded student generated; None where its class cannot generate
    difference: float  # largest difference of a logit, relative to the largest logit
    form: str
    folded: bool  # static scales are folded into weights
    padded: dict[str, Any] | None
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the value as JSON holds it, the architecture under `class`."""
        values = asdict(self)
        return {"class": values.pop("architecture"), **values}
