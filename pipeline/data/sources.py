"""Where text comes from: builtin texts, files, folders, saved data sets and hub data sets, read piece by piece."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data import tables
from pipeline.data.answers import Span
from pipeline.data.builtin import BUILTINS
from pipeline.data.chats import as_turns, check_written, turns
from pipeline.data.columns import Chat, Value
from pipeline.data.formats import LOCAL, MARKERS, kind_of
from pipeline.data.lines import records
from pipeline.data.plain import PIECE, paragraphs
from pipeline.data.templates import ChatTemplate

__all__ = ["PIECE", "Corpus", "Piece", "check", "locate", "read"]

HELD = {str: "text", Chat: "turns"}
FIRST = 64  # records in which a text or turns are looked for before any work
HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<configuration>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")


class Piece(NamedTuple):
    """A part of a document.

    `ends`: its document ends with it. `whole`: no part of it stays alone, as of a chat. `answers`: the characters that
    are an assistant's, as spans; None where they are not needed, and of text that is no chat.
    """

    text: str
    ends: bool
    whole: bool = False
    answers: tuple[Span, ...] | None = None


@dataclass(frozen=True)
class Corpus:
    """A located text; two spellings of one place are equal."""

    given: str = field(compare=False)
    kind: str  # builtin | text | jsonl | parquet | saved | hub
    key: str  # the builtin's name, the hub id, or the resolved path
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """A short name fit for a folder."""
        whole = Path(self.key)
        word = whole.stem if self.files == (whole,) else whole.name if self.files else self.key
        return re.sub(r"[^\w.]+", "-", word).strip("-.") or "text"


def locate(given: str) -> Corpus:
    """Return the text at a configured path. Raise ValueError where there is none or its format is not read."""
    if given.startswith("builtin:"):
        name = given.removeprefix("builtin:")
        if name not in BUILTINS:
            raise ValueError(f"{given} is unknown; there are {', '.join('builtin:' + known for known in BUILTINS)}")
        return Corpus(given, "builtin", name, ())
    try:
        path = Path(given).expanduser()
        if path.is_dir():
            return _folder(given, path.resolve())
        if path.exists() or path.is_symlink():
            return Corpus(given, kind_of(path), str(path.resolve()), (path.resolve(),))
    except (OSError, ValueError) as fault:
        raise ValueError(_reason(fault, given)) from None
    except RuntimeError as fault:  # of `expanduser`
        raise ValueError(f"{given} does not exist ({fault}); give the path without ~") from None
    if HUB.fullmatch(given) and path.suffix.lower() not in LOCAL:
        return Corpus(given, "hub", given, ())
    raise ValueError(f"{given} does not exist; give a file, a folder, builtin:NAME, or a hub id owner/name")


def _reason(fault: Exception, given: str) -> str:
    if isinstance(fault, OSError):
        return f"{fault.filename or given} cannot be read: {fault.strerror or fault}; check its rights and its disk"
    return str(fault)


def _folder(given: str, root: Path) -> Corpus:
    if (root / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in root.glob("*/state.json"))
        example = f"; give one, as {given.rstrip('/')}/{splits[0]}" if splits else "; save it again"
        raise ValueError(f"{given} holds the splits {', '.join(splits) or 'none'}{example}")
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        return Corpus(given, "saved", str(root), tables.saved_files(root, given))
    every = sorted(_files(root))
    files = [path for path in every if not path.is_file() or path.stat().st_size] or every  # programs leave empty parts
    kinds = sorted({kind_of(path) for path in files})
    if not kinds:
        raise ValueError(f"{given} holds no files; put text in it")
    if len(kinds) > 1:
        raise ValueError(f"{given} mixes {' and '.join(kinds)} files; give a folder of one kind")
    return Corpus(given, kinds[0], str(root), tuple(path.resolve() for path in files))


def _files(root: Path) -> Iterator[Path]:
    """Yield what lies in a folder and the folders within, hidden files and folders aside.

    Raise ValueError for a link to a folder, which could lead anywhere, and OSError for a folder that cannot be read.
    """

    def refuse(fault: OSError) -> None:
        raise fault

    for place, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(place) / name).is_symlink():
                raise ValueError(f"{Path(place) / name} is a link to a folder; give that folder as a path of its own")
        yield from (Path(place) / name for name in names if not name.startswith(".") and name not in MARKERS)


def check(corpus: Corpus, field: str) -> bool:
    """Return whether the records are chats; of a hub data set that is not known.

    Reads sizes, heads, columns and the first records, and no network. Raise ValueError where `read` could not succeed.
    """
    try:
        if corpus.files and not sum(path.stat().st_size for path in corpus.files):
            raise ValueError(f"{corpus.given} is empty; give a text that is not")
        if corpus.kind in ("jsonl", "parquet"):
            return _check_files(corpus, field)
        return corpus.kind == "saved" and bool(_begins_with_turns(_records(corpus, field)))
    except OSError as fault:
        raise ValueError(_reason(fault, corpus.given)) from None


def _check_files(corpus: Corpus, field: str) -> bool:
    if corpus.kind == "parquet" and not sum(tables.check_parquet(path, field) for path in corpus.files):
        raise ValueError(f"{corpus.given} has no rows; give a text that has some")
    kinds = {_begins_with_turns(_file_records(corpus.kind, path, field)) for path in corpus.files}
    if kinds >= {True, False}:
        raise ValueError(f"{corpus.given} mixes files of text and of turns; give them as two paths")
    return True in kinds


def _begins_with_turns(rows: Iterator[tuple[str, Value]]) -> bool | None:
    """Return whether the first record that holds anything holds turns; None where the first hold nothing.

    Raise ValueError if they have no known form.
    """
    for _, (place, value) in zip(range(FIRST), rows, strict=False):
        value = _value(place, value)
        if value:
            return isinstance(value, Chat) and bool(turns(value, place))
    return None


def read(corpus: Corpus, field: str, tokenizer: Any = None, answers: bool = False) -> Iterator[Piece]:
    """Yield every piece in a fixed order: whole records, but paragraphs of text files (a file is a document).

    Records of turns are rendered by the tokenizer's chat template, with `answers` with the spans of the assistant.
    Raise ValueError, naming file and record, where a corpus holds both text and turns, and for what is neither.
    """
    try:
        if corpus.kind == "text":
            for path in corpus.files:
                yield from _document(paragraphs(path))
        else:
            with ChatTemplate(tokenizer) as template:
                yield from _pieces(corpus, field, template, answers)
    except OSError as fault:
        raise ValueError(_reason(fault, corpus.given)) from None


def _pieces(corpus: Corpus, field: str, template: ChatTemplate, answers: bool) -> Iterator[Piece]:
    first = None
    for place, value in _records(corpus, field):
        value = _value(place, value)
        if not value:
            continue
        first = first or type(value)
        if type(value) is not first:
            fault = f"{place} holds {HELD[type(value)]}, and records before it {HELD[first]}: {value!r:.80}"
            raise ValueError(f"{fault}; give them as two paths")
        if isinstance(value, str):
            yield Piece(_characters(value, place), True)
            continue
        said, spans = turns(value, place), None
        if answers:
            text, spans = template.answers(said, place, value.tools)
        else:
            text = template.render(said, place, value.tools)
        check_written(said, text, place)
        yield Piece(_characters(text, place), True, True, None if spans is None else tuple(spans))


def _value(place: str, value: Value) -> Value:
    """Return what a record holds: a text, turns, or nothing."""
    if not isinstance(value, str):
        return value
    found = as_turns(value, place) if value.strip() else None
    return Chat(found) if isinstance(found, list) else found


def _characters(text: str, place: str) -> str:
    """Return a text. Raise ValueError for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        half = f"\\u{ord(text[fault.start]):04x}"
        raise ValueError(f"{place} holds half a surrogate pair, {half}; correct it, or leave it out") from None
    return text


def _document(parts: Iterator[str]) -> Iterator[Piece]:
    """Yield the pieces of one document; a blank part at its end is left out."""
    previous = last = None
    for part in parts:
        if previous is not None:
            yield Piece(previous, False)
        previous, last = last, part
    rest = "" if last is None else last.strip()
    if previous is not None:
        yield Piece(previous, not rest)
    if last is not None and rest:
        yield Piece(last, True)


def _records(corpus: Corpus, field: str) -> Iterator[tuple[str, Value]]:
    """Yield every record's place, as errors name it, and what its column holds."""
    if corpus.kind == "builtin":
        yield from ((corpus.given, text) for text in BUILTINS[corpus.key]())
    elif corpus.kind in ("jsonl", "parquet"):
        for path in corpus.files:
            yield from _file_records(corpus.kind, path, field)
    elif corpus.kind == "saved":
        yield from tables.table_records(tables.saved(corpus.key, corpus.given, field), corpus.given, field)
    else:
        place = HUB.fullmatch(corpus.key)
        assert place is not None  # `locate` accepts no other key
        table = tables.hub(place["id"], place["configuration"], place["split"], corpus.given, field)
        yield from tables.table_records(table, corpus.given, field)


def _file_records(kind: str, path: Path, field: str) -> Iterator[tuple[str, Value]]:
    return records(path, field) if kind == "jsonl" else tables.parquet_records(path, field)
