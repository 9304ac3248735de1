"""What a file of text is: plain text, JSON lines or parquet, by its ending and its first bytes; all else is refused."""

import codecs
import json
import re
from pathlib import Path
from typing import Any

HEAD = 1 << 16  # bytes by which a file is recognised
TABLES = {".json", ".csv", ".tsv", ".xml", ".xlsx"}  # data, not prose
PACKED = {".gz", ".zst", ".zip", ".bz2", ".xz", ".7z", ".tar", ".tgz", ".lz4"}
LINES = {".jsonl", ".ndjson", ".jsonlines"}
LOCAL = TABLES | PACKED | LINES | {".txt", ".text", ".md", ".rst", ".parquet"}  # endings that no hub id has
MARKERS = {"_SUCCESS"}  # left among data by programs that write it

_POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a git-lfs pointer, not the file; run `git lfs pull`",
    b"version https://hawser.github.com/spec/": "a git-lfs pointer, not the file; run `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer, not the file; run `git annex get`",
    b"../.git/annex/objects/": "a git-annex pointer, not the file; run `git annex get`",
}
_OBJECT = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:')
_CUT = re.compile(r'\{\s*"(?:[^"\\]|\\.)*("\s*:|\\?\Z)')  # an object whose line is cut, even within its first key
_ARRAY = re.compile(r'\[\s*(\{\s*"(?:[^"\\]|\\.)*"\s*:|\[\s*"|")')


def kind_of(path: Path) -> str:
    """Return `text`, `jsonl` or `parquet`. Raise ValueError for a file that is none of them, or no file at all."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a broken link to {path.readlink()}; fetch the file, or remove the link")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; remove it from the text")
    ending = path.suffix.lower()
    if ending in TABLES:
        raise ValueError(f"{path} is a {ending} file; text is read from .jsonl, .parquet, or any plain text file")
    if ending in PACKED:
        raise ValueError(f"{path} is a compressed {ending} file; decompress it")
    with open(path, "rb") as file:
        head = file.read(HEAD)
        begins, more = head.removeprefix(codecs.BOM_UTF8), len(head) == HEAD
        while more and not begins.strip():
            begins = file.read(HEAD)
            more = len(begins) == HEAD
    for mark, what in _POINTERS.items():
        if head.startswith(mark):
            raise ValueError(f"{path} is {what}")
    if ending == ".parquet" or head.startswith(b"PAR1"):
        return "parquet"
    if ending in LINES:
        return "jsonl"
    for part in (head, begins):
        check_text(path, part)
    return _json_kind(path, codecs.getincrementaldecoder("utf-8")().decode(begins), more)


def check_text(path: Path, head: bytes) -> None:
    """Raise ValueError for bytes that are no beginning of UTF-8 text."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; convert it, or give .jsonl or .parquet") from None
    if b"\0" in head:
        raise ValueError(f"{path} is not text: it has NUL bytes; give plain text, .jsonl or .parquet")


def _json_kind(path: Path, head: str, more: bool) -> str:
    """Return `jsonl` for text whose first line is a JSON object, `text` for prose; refuse any other JSON."""
    start = head.lstrip()
    first, _, rest = start.partition("\n")
    if more and not rest and _CUT.match(first):
        return "jsonl"  # its first record is longer than the head
    value = _parsed(first)
    if isinstance(value, dict):
        return "jsonl"
    if _ARRAY.match(start) or (value is None and _OBJECT.match(start)):
        raise ValueError(f"{path} holds JSON, but not one object a line; write it as .jsonl")
    _check_lines(path, [line.strip() for line in start.split("\n") if line.strip()], more)
    return "text"


def _check_lines(path: Path, lines: list[str], more: bool) -> None:
    """Raise ValueError where most lines of a file are JSON objects, or all are JSON strings with escapes.

    `more`: the last line is cut.
    """
    cut = lines.pop() if more and lines else ""
    objects = sum(bool(_parsed(line)) and line.startswith("{") for line in lines) + bool(_CUT.match(cut))
    if 2 * objects > len(lines) + bool(cut):
        number = next(number for number, line in enumerate([*lines, cut], start=1) if not _OBJECT.match(line))
        line = [*lines, cut][number - 1]
        fault = f"{path} holds JSON lines, but line {number} (blank ones not counted) is no object: {line!r:.80}"
        raise ValueError(f"{fault}; correct or remove it")
    if any("\\" in line for line in lines) and all(isinstance(_parsed(line), str) for line in lines):
        raise ValueError(f"{path} holds a JSON string a line; write an object a line, as .jsonl")


def _parsed(line: str) -> Any:
    """Return the JSON value of a line; None for any other line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
