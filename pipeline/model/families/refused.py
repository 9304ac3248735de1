"""Model types without a table, each with the reason."""

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {}
