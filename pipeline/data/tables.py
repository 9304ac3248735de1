"""Tables of Arrow: parquet files, saved data sets and data sets of the hub, of which columns are text or turns."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from pipeline.data.chats import FORMS
from pipeline.data.columns import TOOLS, Value, columns, value_of
from pipeline.data.lines import RECORD, check_column
from pipeline.model.hub import hub_reason

ROWS = 256  # read at once
HELD = 1 << 24  # bytes of rows that are Python's at once, beside a single row
OBJECT = 64  # bytes that a value takes in Python, beside its text
DATA_FILES = ("_data_files", "_indices_data_files")  # in the state of a saved data set
EXPANDS = 1000  # times the size of its file that a row group may have in memory


def check_parquet(path: Path, field: str) -> int:
    """Return the number of rows of a file. Raise ValueError for a damaged one, or a column without text or turns."""
    with _opened(path) as table:
        _check_type(str(path), field, table.schema_arrow)
        try:
            _check_expansion(path, table)
        except _damage() as fault:
            _refuse_parquet(path, fault, "")
        return table.metadata.num_rows


def parquet_records(path: Path, field: str) -> Iterator[tuple[str, Value]]:
    """Yield each row's place, as errors name it, and what its column holds."""
    number = 0
    with _opened(path) as table:
        names = _read(field, table.schema_arrow.names)
        texts = _texts(table, names)
    with _opened(path, texts) as table:
        try:
            for batch in table.iter_batches(ROWS, columns=names):
                for rows in _parts(batch, str(path), number):
                    for record in _records(rows):
                        number += 1
                        yield f"{path} row {number}: column {field!r}", value_of(record, field, f"{path} row {number}")
        except _damage() as fault:
            _refuse_parquet(path, fault, f" after row {number}")


def _texts(table: Any, names: list[str]) -> list[str]:
    """Return the columns of strings in a file, within columns of the given names.

    Read as dictionaries, a value that rows repeat is held once, as in the file.
    """
    leaves = [table.schema.column(number) for number in range(len(table.schema))]
    strings = (leaf.path for leaf in leaves if (leaf.physical_type, leaf.logical_type.type) == ("BYTE_ARRAY", "STRING"))
    return [path for path in strings if _is_of(path, names)]


def _is_of(path: str, names: list[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _check_expansion(path: Path, table: Any) -> None:
    """Raise ValueError for rows that claim to be larger in memory than text can be, by the file's metadata.

    The metadata of single columns is not read: where it is damaged, Arrow ends the process.
    """
    on_disk = path.stat().st_size
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        if group.total_byte_size > max(RECORD, EXPANDS * on_disk) or group.num_rows > RECORD:
            size = f"{group.num_rows:,} rows in {group.total_byte_size:,} bytes"
            fault = f"{path}: row group {number + 1} holds {size} of {on_disk:,} on disk, which is no text"
            raise ValueError(f"{fault}; write it again, in smaller row groups")


def _parts(rows: Any, given: str, before: int) -> Iterator[Any]:
    """Yield rows of Arrow in parts that Python holds in HELD bytes, or that are single rows.

    `before`: the rows of the text before these. Raise ValueError where one row needs more than RECORD.
    """
    size = sum(_bytes(part) for part in rows.columns)
    if size > RECORD and len(rows) == 1:
        raise ValueError(f"{given} row {before + 1} needs more than {RECORD >> 20} MiB; leave it out, or divide it")
    if size <= HELD or len(rows) == 1:
        yield rows
        return
    half = len(rows) // 2
    yield from _parts(rows.slice(0, half), given, before)
    yield from _parts(rows.slice(half), given, before + half)


def _bytes(column: Any) -> int:
    """Return the bytes that a column of Arrow takes in Python, each repetition of a value counted."""
    import pyarrow as arrow
    from pyarrow import compute, types

    if isinstance(column, arrow.ChunkedArray):
        return sum(_bytes(part) for part in column.chunks)
    kind, own = column.type, OBJECT * len(column)
    if types.is_struct(kind):
        return own + sum(_bytes(part) for part in column.flatten())
    if types.is_nested(kind) and hasattr(column, "flatten"):
        return own + _bytes(column.flatten())
    if types.is_dictionary(kind):
        lengths = compute.binary_length(column.dictionary)
        return own + (compute.sum(compute.take(lengths, column.indices)).as_py() or 0)
    return own + column.nbytes


def _records(rows: Any) -> Iterator[dict[str, Any]]:
    from pyarrow import types

    plain = (part.dictionary_decode() if types.is_dictionary(part.type) else part for part in rows.columns)
    for values in zip(*(part.to_pylist() for part in plain), strict=True):
        yield dict(zip(rows.schema.names, values, strict=True))


def _opened(path: Path, texts: list[str] | None = None) -> Any:
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path, read_dictionary=texts)
    except _damage() as fault:
        _refuse_parquet(path, fault, "")


def _damage() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for a damaged file, decoding errors of its strings included."""
    import pyarrow as arrow

    return (arrow.ArrowException, OSError, UnicodeDecodeError)


def _refuse_parquet(path: Path, fault: Exception, where: str) -> NoReturn:
    reason = " ".join(str(fault).split())
    raise ValueError(f"{path} is not a whole parquet file{where}; fetch it again ({reason:.120})") from None


def saved_files(folder: Path, given: str) -> tuple[Path, ...]:
    """Return the files that a data set of `save_to_disk` is read from, which all lie in its folder.

    Raise ValueError where its state names none, or one elsewhere.
    """
    state = folder / "state.json"
    try:
        parts = json.loads(state.read_text(encoding="utf-8"))
        names = [part["filename"] for key in DATA_FILES for part in parts.get(key) or ()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as fault:
        raise ValueError(f"{given} is not a whole saved data set; save it again ({_one_line(fault)})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{state} names {name!r:.160}, which is no file in its folder; save the data set again")
    return tuple((folder / name).resolve() for name in (state.name, "dataset_info.json", *dict.fromkeys(names)))


def saved(folder: str, given: str, field: str) -> Any:
    """Return a data set of `save_to_disk`. Raise ValueError for a damaged one, or a column without text or turns."""
    import datasets

    try:
        table = datasets.load_from_disk(folder)
    except Exception as fault:  # whatever its files hold is read by the library
        raise ValueError(f"{given} is not a whole saved data set; save it again ({_one_line(fault)})") from None
    return _checked(given, field, table)


def hub(name: str, configuration: str | None, split: str | None, given: str, field: str) -> Any:
    """Return a data set of the hub. Raise ValueError if it cannot be loaded, or for a column without text or turns."""
    import datasets

    try:
        table = datasets.load_dataset(name, configuration, split=split or "train")
    except Exception as fault:  # not found, gated, no network, several configurations, no such split, damaged files
        raise ValueError(f"hub data set {given} cannot be loaded: {hub_reason(fault)}") from None
    return _checked(given, field, table)


def table_records(table: Any, given: str, field: str) -> Iterator[tuple[str, Value]]:
    """Yield each row's place, as errors name it, and what its column holds."""
    number = 0
    arrow, plain = table.with_format("arrow"), table.with_format(None)
    try:
        for start in range(0, len(table), ROWS):
            for rows in _parts(arrow[start : start + ROWS], given, number):
                batch = plain[number : number + len(rows)]
                for values in zip(*batch.values(), strict=True):
                    number += 1
                    record = dict(zip(batch, values, strict=True))
                    yield f"{given} row {number}: column {field!r}", value_of(record, field, f"{given} row {number}")
    except _damage() as fault:
        raise ValueError(f"{given} is damaged after row {number} ({_one_line(fault)}); save it again") from None


def _checked(given: str, field: str, table: Any) -> Any:
    if not len(table):
        raise ValueError(f"{given} has no rows; give a text that has some")
    _check_type(given, field, table.features.arrow_schema)
    return table.select_columns(_read(field, table.column_names))


def _read(field: str, known: list[str]) -> list[str]:
    """Return the columns that are read: those of `data.text_field`, and that of tools where there is one."""
    return list(dict.fromkeys([*columns(field, known), *([TOOLS] if TOOLS in known else [])]))


def _check_type(place: str, field: str, schema: Any) -> None:
    """Raise ValueError where a column of an Arrow schema can hold neither text nor turns."""
    check_column(place, field, schema.names)
    for name in _read(field, schema.names):
        if schema.names.count(name) > 1:
            raise ValueError(f"{place} has {schema.names.count(name)} columns {name!r}; write it with one")
    for name in columns(field, schema.names):
        _check_column_type(place, name, schema)


def _check_column_type(place: str, field: str, schema: Any) -> None:
    from pyarrow import types

    kind = schema.field(field).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    listed = any(is_kind(kind) for is_kind in lists) and types.is_struct(kind.value_type)
    if listed and any(set(form) <= {part.name for part in kind.value_type} for form in FORMS):
        return
    raise ValueError(f"{place}: column {field!r} holds no text and no turns, but {kind!s:.80}; set data.text_field")


def _one_line(fault: Exception) -> str:
    return " ".join(str(fault).split())[:300] or type(fault).__name__
