"""Tables of Arrow: parquet files, saved data sets and data sets of the hub, of which columns are text or turns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from pipeline.data.chats import FORMS
from pipeline.data.columns import TOOLS, Value, columns, value_of
from pipeline.data.lines import check_column
from pipeline.model.hub import hub_reason

ROWS = 256  # read at once


def check_parquet(path: Path, field: str) -> int:
    """Return the number of rows of a file. Raise ValueError for a damaged one, or a column without text or turns."""
    with _opened(path) as table:
        _check_type(str(path), field, table.schema_arrow)
        return table.metadata.num_rows


def parquet_records(path: Path, field: str) -> Iterator[tuple[str, Value]]:
    """Yield each row's place, as errors name it, and what its column holds."""
    number = 0
    with _opened(path) as table:
        try:
            for batch in table.iter_batches(ROWS, columns=_read(field, table.schema_arrow.names)):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}: column {field!r}", value_of(record, field, f"{path} row {number}")
        except _damage() as fault:
            _refuse_parquet(path, fault, f" after row {number}")


def _opened(path: Path) -> Any:
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path)
    except _damage() as fault:
        _refuse_parquet(path, fault, "")


def _damage() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for a damaged file, decoding errors of its strings included."""
    import pyarrow as arrow

    return (arrow.ArrowException, OSError, UnicodeDecodeError)


def _refuse_parquet(path: Path, fault: Exception, where: str) -> NoReturn:
    reason = " ".join(str(fault).split())
    raise ValueError(f"{path} is not a whole parquet file{where}; fetch it again ({reason:.120})") from None


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
    try:
        for batch in table.iter(batch_size=ROWS):
            for values in zip(*batch.values()):
                number += 1
                record = dict(zip(batch, values))
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
    for name in columns(field, schema.names):
        _check_column_type(place, name, schema)


def _check_column_type(place: str, field: str, schema: Any) -> None:
    from pyarrow import types

    kind = schema.field(field).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind):
        return
    listed = (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type)
    if listed and any(set(form) <= {part.name for part in kind.value_type} for form in FORMS):
        return
    raise ValueError(f"{place}: column {field!r} holds no text and no turns, but {kind!s:.80}; set data.text_field")


def _one_line(fault: Exception) -> str:
    return " ".join(str(fault).split())[:300] or type(fault).__name__
