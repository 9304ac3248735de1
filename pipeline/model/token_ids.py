"""Token ids of a student with a part of the vocabulary, and the fields of JSON files that hold such ids."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.model.stored import Stored

ONE = re.compile(r"(^|_)token_(id|ids|index)$")  # an id, or a list of ids that mean the same
SETS = ("suppress_tokens", "begin_suppress_tokens")  # ids that are not generated
SEQUENCES = ("bad_words_ids", "force_words_ids")  # lists of ids


@dataclass(frozen=True)
class Renumbering:
    """The new ids of kept tokens. Ids beyond the model's `old` tokens, which have no weights, stay beyond its `new`."""

    places: Mapping[int, int]  # id in the source -> id in the student
    old: int
    new: int

    @classmethod
    def of(cls, vocabulary: Sequence[int], old: int) -> "Renumbering":
        """Return the renumbering that keeps the tokens `vocabulary`, in that order, of `old` ones."""
        return cls({token: place for place, token in enumerate(vocabulary)}, old, len(vocabulary))

    def get(self, token: int) -> int | None:
        """Return the new id of a token, None where it is not kept; a negative id means no token and stays."""
        if token < 0:
            return token
        return self.places.get(token) if token < self.old else self.new + token - self.old

    def __getitem__(self, token: int) -> int:
        found = self.get(token)
        if found is None:
            raise ValueError(f"token {token} is used and not kept; keep it")
        return found

    def fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json or generation_config.json with new ids.

        Of ids that are not to be generated, and of word lists, what is not kept is left out. Raise ValueError, naming
        the field, where another field needs a token that is not kept.
        """
        edited = dict(fields)
        for name, value in fields.items():
            if value is None:
                continue
            if ONE.search(name):
                try:
                    edited[name] = [self[each] for each in value] if isinstance(value, list) else self[value]
                except ValueError as fault:
                    raise ValueError(f"{name}: {fault}") from None
            elif name in SETS:
                edited[name] = self._kept(value)
            elif name in SEQUENCES:
                edited[name] = [self._kept(each) for each in value if all(self.get(id_) is not None for id_ in each)]
            elif name == "forced_decoder_ids":
                edited[name] = [[place, new] for place, id_ in value if (new := self.get(id_)) is not None]
            elif name == "sequence_bias":
                whole = (each for each in value if all(self.get(id_) is not None for id_ in each[0]))
                edited[name] = [[self._kept(ids), bias] for ids, bias in whole]
        return edited

    def _kept(self, ids: Iterable[int]) -> list[int]:
        return [new for id_ in ids if (new := self.get(id_)) is not None]


@dataclass(frozen=True)
class Vocabulary(Stored):
    """The tokens of a model that remain, ascending, of `rows` ones; and how much of a text's tokens are among them."""

    FILE: ClassVar[str] = "vocabulary.json"
    INDENT: ClassVar[int | None] = None

    kept: tuple[int, ...]
    rows: int
    used: int  # different tokens in the text
    used_kept: int
    share: float  # of the text's tokens

    @property
    def renumbering(self) -> Renumbering:
        return Renumbering.of(self.kept, self.rows)


def used_ids(fields: Mapping[str, Any]) -> set[int]:
    """Return the ids that fields of a config.json or generation_config.json name as tokens with a meaning."""
    found: set[int] = set()
    for name, value in fields.items():
        if ONE.search(name) and value is not None:
            found.update(value if isinstance(value, list) else [value])
    return found
