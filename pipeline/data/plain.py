"""Plain text files: a file is one document, read in paragraphs."""

from collections.abc import Iterator
from pathlib import Path

MARK = "\ufeff"  # byte order mark
PIECE = 1 << 16  # characters: the longest part of a file held at once


def paragraphs(path: Path) -> Iterator[str]:
    """Yield paragraphs with the blank lines that follow them; one longer than PIECE is cut at a line's end or within.

    Raise ValueError, naming file and line, for bytes that are no UTF-8 text.
    """
    paragraph: list[str] = []
    size, blank, number = 0, False, 1
    try:
        with open(path, encoding="utf-8") as file:  # utf-8-sig skips the beginning of a byte order mark at the end
            while line := file.readline(PIECE):
                line = line.removeprefix(MARK) if not size and number == 1 else line
                if "\0" in line:
                    raise ValueError(f"{path} is not text: it has NUL bytes in line {number}; give plain text")
                number += line.endswith("\n")
                if paragraph and (blank and line.strip() or size + len(line) > PIECE):
                    yield "".join(paragraph)
                    paragraph, size = [], 0
                paragraph.append(line)
                size += len(line)
                blank = not line.strip()
    except UnicodeDecodeError as fault:
        reason = f"line {_undecodable_line(path)}: {fault.reason}"
        raise ValueError(f"{path} is not UTF-8 text ({reason}); convert it, or give .jsonl or .parquet") from None
    if paragraph:
        yield "".join(paragraph)


def _undecodable_line(path: Path) -> int:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return number
