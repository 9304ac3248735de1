"""Values stored as one JSON file of an artifact folder, for the stages that read them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError


@dataclass(frozen=True)
class Stored:
    """Base of a frozen dataclass that an artifact folder holds as JSON under its `FILE`.

    Fields are numbers, strings, booleans, None, tuples, dictionaries and dataclasses of these.
    """

    FILE: ClassVar[str]
    INDENT: ClassVar[int | None] = 1  # None: on one line
    __pydantic_config__ = ConfigDict(extra="forbid")

    def save(self, folder: Path) -> None:
        """Write the value into a folder."""
        text = json.dumps(self.to_json(), indent=self.INDENT, ensure_ascii=False)
        (folder / self.FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the value from a folder.

        Raise ValueError, in one line, where the file does not hold exactly the fields of this class.
        """
        path = folder / cls.FILE
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: {_reason(error)}; delete its folder to make it again") from None

    def to_json(self) -> Any:
        """Return the value as JSON holds it."""
        return asdict(self)


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(key) if str(key).isprintable() else repr(key) for key in first["loc"])
    return ": ".join(filter(None, (place, first["msg"])))
