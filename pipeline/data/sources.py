"""Where text comes from: builtin texts, files, folders, saved data sets and hub data sets, read piece by piece."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.builtin import BUILTINS
from pipeline.data.chats import FORMS, turns, written

PIECE = 1 << 16  # characters: the longest piece of a text file held at once
HELD = {str: "text", list: "turns"}
TABLES = {".json", ".csv", ".tsv"}  # text, but not prose: learning from their punctuation is never what was meant
LOCAL = TABLES | {".txt", ".text", ".md", ".rst", ".jsonl", ".parquet"}  # endings that no hub id has
HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<configuration>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")


class Piece(NamedTuple):
    """A stretch of a document; `ends` says that its document ends with it."""

    text: str
    ends: bool


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
    """Find a text by its configured path; ValueError where there is none or its format is not read."""
    if given.startswith("builtin:"):
        name = given.removeprefix("builtin:")
        if name not in BUILTINS:
            raise ValueError(f"{given} is unknown; there are {', '.join('builtin:' + known for known in BUILTINS)}")
        return Corpus(given, "builtin", name, ())
    path = Path(given).expanduser()
    if path.is_dir():
        return _folder(given, path.resolve())
    if path.is_file():
        return Corpus(given, _kind(path), str(path.resolve()), (path.resolve(),))
    if HUB.fullmatch(given) and path.suffix.lower() not in LOCAL:
        return Corpus(given, "hub", given, ())
    raise ValueError(f"{given} does not exist; give a file, a folder, builtin:NAME, or a hub id owner/name")


def _folder(given: str, root: Path) -> Corpus:
    if (root / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in root.glob("*/state.json"))
        raise ValueError(f"{given} holds the splits {', '.join(splits)}; give one, as {given.rstrip('/')}/{splits[0]}")
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        return Corpus(given, "saved", str(root), tuple(sorted(root.glob("*.arrow"))))
    found = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    files = [root / path for path in found if not any(part.startswith(".") for part in path.parts)]
    kinds = sorted({_kind(path) for path in files})
    if not kinds:
        raise ValueError(f"{given} holds no files; put text in it")
    if len(kinds) > 1:
        raise ValueError(f"{given} mixes {' and '.join(kinds)} files; give a folder of one kind")
    return Corpus(given, kinds[0], str(root), tuple(path.resolve() for path in files))


def _kind(path: Path) -> str:
    ending = path.suffix.lower()
    if ending in TABLES:
        raise ValueError(f"{path} is a {ending} file; text is read from .jsonl, .parquet, or any plain text file")
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(ending, "text")


def check(corpus: Corpus, field: str) -> bool:
    """Look at sizes, heads and columns, reading no text; ValueError where `read` could not succeed. Asks no network.

    Gives whether the records are chats; of a hub data set that is not known.
    """
    try:
        if corpus.files and not sum(path.stat().st_size for path in corpus.files):
            raise ValueError(f"{corpus.given} is empty")
        if corpus.kind == "text":
            for path in corpus.files:
                _check_text(path)
        elif corpus.kind == "jsonl":
            return _alike(corpus, [_begins_with_turns(path, field) for path in corpus.files])
        elif corpus.kind == "parquet":
            return _check_parquet(corpus, field)
        elif corpus.kind == "saved":
            return _holds_turns(corpus.given, field, _saved(corpus, field).features.arrow_schema)
        return False
    except OSError as fault:
        raise ValueError(f"{fault.filename or corpus.given} cannot be read: {fault.strerror or fault}") from None


def _check_text(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(4096)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; convert it, or give .jsonl or .parquet") from None
    if b"\0" in head:
        raise ValueError(f"{path} is not text: it has NUL bytes; give plain text, .jsonl or .parquet")


def _begins_with_turns(path: Path, field: str) -> bool:
    place, value = next((record for record in _lines(path, field) if record[1]), ("", ""))
    return isinstance(value, list) and bool(turns(value, place))


def _alike(corpus: Corpus, files: list[bool]) -> bool:
    if len(set(files)) > 1:
        raise ValueError(f"{corpus.given} mixes files of text and of turns; give them as two paths")
    return any(files)


def _check_parquet(corpus: Corpus, field: str) -> bool:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows, hold_turns = 0, []
    for path in corpus.files:
        try:
            table = parquet.ParquetFile(path)
        except arrow.ArrowInvalid:
            raise ValueError(f"{path} is not a whole parquet file; fetch it again") from None
        with table:
            _check_column(str(path), field, table.schema_arrow.names)
            hold_turns.append(_holds_turns(str(path), field, table.schema_arrow))
            rows += table.metadata.num_rows
    if not rows:
        raise ValueError(f"{corpus.given} has no rows")
    return _alike(corpus, hold_turns)


def _holds_turns(place: str, field: str, schema) -> bool:
    """Whether a column of an Arrow schema holds turns; ValueError where it holds no text either."""
    from pyarrow import types

    kind = schema.field(field).type
    if types.is_string(kind) or types.is_large_string(kind):
        return False
    listed = (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type)
    if listed and any(set(form) <= {part.name for part in kind.value_type} for form in FORMS):
        return True
    raise ValueError(f"{place}: column {field!r} holds no text and no turns, but {kind!s:.80}; set data.text_field")


def _check_column(place: str, field: str, columns: Iterable[str]) -> None:
    if field not in columns:
        told = f"{place} has no column {field!r} but {', '.join(columns)}"
        raise ValueError(f"{told}; set data.text_field to the one that holds text or turns")


def _saved(corpus: Corpus, field: str):
    import datasets

    try:
        table = datasets.load_from_disk(corpus.key)
    except (OSError, ValueError) as fault:
        raise ValueError(f"{corpus.given} is not a whole saved data set: {str(fault).splitlines()[0]}") from None
    return _table(corpus, field, table)


def _hub(corpus: Corpus, field: str):
    import datasets

    asked = HUB.fullmatch(corpus.key)
    try:
        table = datasets.load_dataset(asked["id"], asked["configuration"], split=asked["split"] or "train")
    except (OSError, ValueError) as fault:  # not found, gated, no network, several configurations, no such split
        raise ValueError(f"hub data set {corpus.given} cannot be loaded: {' '.join(str(fault).split())}") from None
    return _table(corpus, field, table)


def _table(corpus: Corpus, field: str, table):
    _check_column(corpus.given, field, table.column_names)
    if not len(table):
        raise ValueError(f"{corpus.given} has no rows")
    _holds_turns(corpus.given, field, table.features.arrow_schema)
    return table.select_columns([field])


def read(corpus: Corpus, field: str, tokenizer: Any = None) -> Iterator[Piece]:
    """Every piece in a fixed order: whole records, but paragraphs of text files (a file is a document).

    Records of turns are written out by the tokenizer's chat template; ValueError where a corpus holds text too.
    """
    if corpus.kind == "text":
        for path in corpus.files:
            yield from _paragraphs(path)
    else:
        first = None
        for place, value in _records(corpus, field):
            if not value or isinstance(value, str) and not value.strip():
                continue
            first = first or type(value)
            if type(value) is not first:
                fault = f"{place} holds {HELD[type(value)]}, and records before it {HELD[first]}: {value!r:.80}"
                raise ValueError(f"{fault}; give them as two paths")
            yield Piece(value if first is str else written(value, tokenizer, place), True)


def _records(corpus: Corpus, field: str) -> Iterator[tuple[str, str | list | None]]:
    """Every record's place, as a fault names it, and what its column holds."""
    if corpus.kind == "builtin":
        yield from ((corpus.given, text) for text in BUILTINS[corpus.key]())
    elif corpus.kind == "jsonl":
        for path in corpus.files:
            yield from _lines(path, field)
    elif corpus.kind == "parquet":
        import pyarrow.parquet as parquet

        for path in corpus.files:
            with parquet.ParquetFile(path) as table:
                rows = (row for some in table.iter_batches(1024, columns=[field]) for row in some.column(0).to_pylist())
                for number, row in enumerate(rows, start=1):
                    yield f"{path} row {number}: column {field!r}", row
    else:
        table = _saved(corpus, field) if corpus.kind == "saved" else _hub(corpus, field)
        rows = (row for some in table.iter(batch_size=1024) for row in some[field])
        for number, row in enumerate(rows, start=1):
            yield f"{corpus.given} row {number}: column {field!r}", row


def _lines(path: Path, field: str) -> Iterator[tuple[str, str | list | None]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                raise ValueError(f"{path}:{number} is not a JSON object in UTF-8, as a .jsonl line is") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number} is not a JSON object, as a .jsonl line is")
            _check_column(f"{path}:{number}", field, record)
            place, value = f"{path}:{number}: column {field!r}", record[field]
            if not isinstance(value, str | list | None):
                raise ValueError(f"{place} holds no text and no turns, but {value!r:.80}; set data.text_field")
            yield place, value


def _paragraphs(path: Path) -> Iterator[Piece]:
    """Paragraphs with the blank lines that follow them; one longer than PIECE is cut at a line's end or within one."""
    held, paragraph, size, blank = None, [], 0, False
    try:
        with open(path, encoding="utf-8-sig") as file:
            while line := file.readline(PIECE):
                if paragraph and (blank and line.strip() or size + len(line) > PIECE):
                    if held is not None:
                        yield Piece(held, False)
                    held, paragraph, size = "".join(paragraph), [], 0
                paragraph.append(line)
                size += len(line)
                blank = not line.strip()
    except UnicodeDecodeError as fault:
        raise ValueError(f"{path} is not UTF-8 text ({fault.reason}); convert it, or give .jsonl or .parquet") from None
    rest = "".join(paragraph)
    if held is not None:
        yield Piece(held, not rest.strip())
    if rest.strip():
        yield Piece(rest, True)
