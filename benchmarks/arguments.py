"""Arguments of the measuring scripts: types for argparse that refuse a value before any work."""

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")


def described(document: str) -> ArgumentParser:
    """Return a parser whose help is a script's docstring, as it is written."""
    return ArgumentParser(description=document, formatter_class=RawDescriptionHelpFormatter)


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of a whole number that is no less than `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


def several(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Return the type of several values between commas."""
    return lambda text: [kind(part) for part in text.split(",")]


def some_of(names: Collection[str]) -> Callable[[str], list[str]]:
    """Return the type of names between commas, each one of `names`."""

    def chosen(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in names]
        if unknown:
            raise ArgumentTypeError(f"names {unknown}; there are {', '.join(names)}")
        return text.split(",")

    return chosen


def percentage(text: str) -> float:
    """Return a percentage between 0 and 100, both excluded."""
    if not text.replace(".", "", 1).isdecimal() or not 0 < float(text) < 100:
        raise ArgumentTypeError(f"{text!r} is no percentage between 0 and 100")
    return float(text)


def existing(text: str) -> Path:
    """Return the path of a file that exists."""
    if not Path(text).is_file():
        raise ArgumentTypeError(f"{text!r} is no file; give the path of one that exists")
    return Path(text)


def folder_with(*inside: str) -> Callable[[str], Path]:
    """Return the type of a folder in which something is: files or folders, by their paths."""

    def folder(text: str) -> Path:
        lacking = [name for name in inside if not (Path(text) / name).exists()]
        if lacking:
            raise ArgumentTypeError(f"{text!r} has no {' and no '.join(lacking)}; give a folder that has")
        return Path(text)

    return folder
