"""The base of every section, which refuses unknown fields, and the ranges that settings share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Portion = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy's range; derived seeds fit in torch's 64 bits
Positive = Annotated[float, Field(gt=0.0)]


def _expanded(folder: str) -> str:
    try:
        return str(Path(folder).expanduser()) if folder.startswith("~") else folder
    except RuntimeError:
        raise ValueError(f"{folder} begins with ~ and names no user of this machine; write the whole path") from None


Folder = Annotated[str, AfterValidator(_expanded)]  # may begin with ~, a home folder


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is expected: Python counts them as 1 and 0."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if _holds_truth(value) and not any(part is bool or isinstance(part, bool) for part in _parts(kind)):
            raise PydanticCustomError("truth_value", "true and false are no numbers")
        return value


def _holds_truth(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_truth, value)))


def _parts(kind: Any) -> Iterator[Any]:
    """Yield a type and the types and literal values inside it."""
    yield kind
    for inner in get_args(kind):
        yield from _parts(inner)
