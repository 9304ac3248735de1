"""What the doctor finds: rows with a judgement and, where something is wrong, what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

OK, WARNING, FAILS, ABSENT = "ok", "warning", "FAILS", "-"  # ABSENT: not there, and not needed


@dataclass(frozen=True)
class Row:
    """One fact with its judgement; `remedy` says what to do where it is a warning or fails."""

    name: str
    value: str
    state: str = OK
    remedy: str = ""


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows in columns, the remedy under each row that is a warning or fails."""
    widths = [max(len(row.name) for row in rows), max(len(row.state) for row in rows)]
    lines = []
    for row in rows:
        lines.append(f"{row.state:<{widths[1]}}  {row.name:<{widths[0]}}  {row.value}")
        if row.state in (WARNING, FAILS) and row.remedy:
            lines.append(f"{'':<{widths[1]}}  {'':<{widths[0]}}  -> {row.remedy}")
    return lines


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
