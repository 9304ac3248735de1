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


@dataclass(frozen=True)
class Converted(Stored):
    """The student as a GGUF file, and what was adapted to llama.cpp's graph of its type."""

    FILE: ClassVar[str] = "gguf.json"

    file: str  # its name in the student's folder
    type: str  # of the large matrices, as requested
    architecture: str  # llama.cpp's name of the graph
    tensors: dict[str, int]  # number of tensors by the type that they are stored in
    bytes: int
    query_factor: float  # the queries were multiplied by this; 1.0 where the graph has the model's scale of attention
    windows: bool  # the order of sliding-window layers was added to the file
