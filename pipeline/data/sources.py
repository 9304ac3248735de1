"""Where text comes from: builtin texts, files, folders, saved data sets and hub data sets, read piece by piece."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.data.builtin import BUILTINS, version

PIECE = 1 << 16  # characters: the longest piece of a text file held at once
EDGE = 1 << 16  # bytes of a file's head and tail that its fingerprint reads
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


def check(corpus: Corpus, field: str) -> None:
    """Look at sizes, heads and columns, reading no text; ValueError where `read` could not succeed. Asks no network."""
    try:
        if corpus.files and not sum(path.stat().st_size for path in corpus.files):
            raise ValueError(f"{corpus.given} is empty")
        if corpus.kind == "text":
            for path in corpus.files:
                _check_text(path)
        elif corpus.kind == "jsonl":
            for path in corpus.files:
                next(_lines(path, field), None)
        elif corpus.kind == "parquet":
            _check_parquet(corpus, field)
        elif corpus.kind == "saved":
            _saved(corpus, field)
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


def _check_parquet(corpus: Corpus, field: str) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = 0
    for path in corpus.files:
        try:
            table = parquet.ParquetFile(path)
        except arrow.ArrowInvalid:
            raise ValueError(f"{path} is not a whole parquet file; fetch it again") from None
        with table:
            _check_column(str(path), field, table.schema_arrow.names)
            if table.schema_arrow.field(field).type not in (arrow.string(), arrow.large_string()):
                raise ValueError(f"{path}: column {field!r} holds no text; set data.text_field")
            rows += table.metadata.num_rows
    if not rows:
        raise ValueError(f"{corpus.given} has no rows")


def _check_column(place: str, field: str, columns: Iterable[str]) -> None:
    if field not in columns:
        raise ValueError(f"{place} has no column {field!r} but {', '.join(columns)}; set data.text_field")


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
    if table.features[field].dtype not in ("string", "large_string"):
        raise ValueError(f"{corpus.given}: column {field!r} holds no text; set data.text_field")
    return table.select_columns([field])


def read(corpus: Corpus, field: str) -> Iterator[Piece]:
    """Every piece in a fixed order: whole records, but paragraphs of text files (a file is a document)."""
    if corpus.kind == "text":
        for path in corpus.files:
            yield from _paragraphs(path)
    else:
        for text in _records(corpus, field):
            if text.strip():
                yield Piece(text, True)


def _records(corpus: Corpus, field: str) -> Iterator[str]:
    if corpus.kind == "builtin":
        yield from BUILTINS[corpus.key]()
    elif corpus.kind == "jsonl":
        for path in corpus.files:
            yield from _lines(path, field)
    elif corpus.kind == "parquet":
        import pyarrow.parquet as parquet

        for path in corpus.files:
            with parquet.ParquetFile(path) as table:
                for rows in table.iter_batches(batch_size=1024, columns=[field]):
                    yield from (text for text in rows.column(0).to_pylist() if text is not None)
    else:
        table = _saved(corpus, field) if corpus.kind == "saved" else _hub(corpus, field)
        for rows in table.iter(batch_size=1024):
            for text in rows[field]:
                if text is not None:
                    yield text


def _lines(path: Path, field: str) -> Iterator[str]:
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
            if not isinstance(record[field], str | None):
                raise ValueError(f"{path}:{number}: column {field!r} holds no text; set data.text_field")
            if record[field] is not None:
                yield record[field]


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


def fingerprint(corpus: Corpus) -> str:
    """What changes with a text, cheaply: sizes, times, heads and tails of its files; a hub id stands for itself."""
    if corpus.kind == "builtin":
        return version(corpus.key)
    if corpus.kind == "hub":
        return corpus.key
    sum_ = hashlib.sha256()
    for path in corpus.files:
        with open(path, "rb") as file:
            facts = path.stat()
            sum_.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
            sum_.update(file.read(EDGE))
            file.seek(max(0, facts.st_size - EDGE))
            sum_.update(file.read(EDGE))
    return sum_.hexdigest()
