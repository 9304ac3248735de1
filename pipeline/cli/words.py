"""The words of a command: options, and settings whose text values are quoted before Hydra's grammar reads them."""

import re
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from pipeline.config import SETTINGS
from pipeline.config.schema import accepts, lists

SWEEP = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|extend_list)\(.*\)")


@dataclass(frozen=True)
class Command:
    """What a command asks for: settings as typed, and options."""

    settings: tuple[str, ...]
    multirun: bool = False
    config_dir: Path | None = None
    source: Path | None = None  # run.json of a run to repeat
    help: str | None = None  # a group of settings, "" for all
    show: bool = False  # print the composed configuration


@dataclass(frozen=True)
class Setting:
    """One setting as typed: [+|++|~]KEY[=VALUE]."""

    prefix: str
    key: str
    value: str | None

    @classmethod
    def of(cls, word: str) -> "Setting":
        """Split a word. Raise ValueError where it is no setting."""
        match = re.fullmatch(r"(\+\+|\+|~)?([^=+~'\"\[\]{}()\s,]+)(?:=(.*))?", word, re.DOTALL)
        if match is None or (match[3] is None and match[1] != "~"):
            raise ValueError(f"{word!r} is no setting; write KEY=VALUE, e.g. run=NAME")
        return cls(match[1] or "", match[2], match[3])

    def __str__(self) -> str:
        return self.prefix + self.key + ("" if self.value is None else f"={self.value}")


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; python -m pipeline --help lists options and settings")


def parsed(words: Sequence[str]) -> Command:
    """Return the options and settings of a command. Raise ValueError where an option is unknown."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("--from", type=Path, dest="source")
    parser.add_argument("-h", "--help", nargs="?", const="")
    parser.add_argument("--cfg", choices=["job"])
    found = vars(parser.parse_intermixed_args(list(words)))
    show = found.pop("cfg") is not None
    return Command(tuple(found.pop("settings")), show=show, **found)


def quoted(setting: Setting, multirun: bool) -> Setting:
    """Return a setting whose text value reads as it was typed: paths and names may hold any character.

    Values that Hydra must interpret stay: null, quoted text, interpolations, sweep functions. With `multirun` commas
    separate the values of a sweep, except in `run`, which names one run.
    """
    kind, value = SETTINGS.get(setting.key), setting.value
    if not value or kind is None or not (accepts(kind, str) or lists(kind, str)):
        return setting
    if multirun and setting.key != "run":
        return Setting(setting.prefix, setting.key, ",".join(_quoted(each, kind) for each in split(value)))
    return Setting(setting.prefix, setting.key, _quoted(value, kind))


def _quoted(value: str, kind: Any) -> str:
    if "${" in value or SWEEP.fullmatch(value) or (value == "null" and accepts(kind, NoneType)):
        return value
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value
    if lists(kind, str) and value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_quoted(each, str) for each in split(value[1:-1]))}]"
    if not accepts(kind, str):
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    whole = re.sub(r"(\\+)$", r"\1\1", escaped)  # backslashes before the closing quote would escape it
    return f"'{whole}'"


def split(text: str) -> list[str]:
    """Split at commas outside brackets and outside elements that are quoted as a whole; blanks around elements go."""
    parts, start, depth, quote = [], 0, 0, ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not text[start:place].strip(" ["):
            quote = character
        elif character in "[(":
            depth += 1
        elif character in "])":
            depth = max(0, depth - 1)
        elif character == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()] if text.strip() else []
