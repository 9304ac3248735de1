"""The header of a GGUF file, validated before any other library reads the file; parts joined, fields added.

Layout (version 2 and 3, little endian): magic, version, number of tensors, number of fields; the fields (key, type,
value); a record for each tensor (name, dimensions, type, offset); then, aligned, the tensors' data.
"""

import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGML_QUANT_SIZES

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct formats
BOOL, STRING, ARRAY = 7, 8, 9
LONGEST_KEY = 1 << 16
LONGEST_NAME = 64  # of a tensor, by the format
LONGEST_TEXT = 1 << 20  # bytes of a string in a field; readers of the format hold each byte as an object
HEADER = 64 << 20  # the most bytes before the data
FIELDS, TENSORS, ENTRIES = 1 << 14, 1 << 18, 1 << 21  # the most fields, tensors, and entries of all arrays
TOKENIZER = "tokenizer."  # arrays under such keys have entries for each token
OTHERS = 1 << 17  # the most entries of all other arrays
ALIGNMENT = 32  # of the data where no field says another
BLOCK = 1 << 24  # bytes copied at a time


@dataclass(frozen=True)
class Tensor:
    """One tensor's record: dimensions as stored (the innermost first), and where its `bytes` lie in the data."""

    name: str
    dimensions: tuple[int, ...]
    kind: int
    offset: int
    bytes: int

    @property
    def elements(self) -> int:
        return prod(self.dimensions)


@dataclass(frozen=True)
class Header:
    """A validated header: the scalar and string fields by key, the bytes of every field, and the tensors' records."""

    path: Path
    version: int
    fields: dict[str, Any]  # an array is represented by its length
    stored: dict[str, bytes]
    tensors: tuple[Tensor, ...]
    alignment: int
    start: int  # of the data in the file

    @property
    def parts(self) -> int:
        """Return the number of files that the model was split into."""
        return self.fields.get("split.count", 1) or 1

    def numbers(self, key: str) -> tuple[Any, ...] | None:
        """Return the number that a field holds, or those of an array; None for a text and an array of texts."""
        kind = self._kind(key)
        if kind != ARRAY:
            return None if kind == STRING else (self.fields[key],)
        data, place = self.stored[key], 12 + len(key.encode())
        inner, length = struct.unpack_from("<IQ", data, place)
        return struct.unpack_from(f"<{length}{SCALARS[inner]}", data, place + 12) if inner in SCALARS else None

    def entries(self, begin: str) -> int:
        """Return the number of entries of all arrays whose keys begin so."""
        return sum(self.fields[key] for key in self.stored if key.startswith(begin) and self._kind(key) == ARRAY)

    def _kind(self, key: str) -> int:
        return struct.unpack_from("<I", self.stored[key], 8 + len(key.encode()))[0]


class _Reader:
    """Reads values from the beginning of a file, counts array entries, and raises ValueError beyond its end."""

    def __init__(self, data: bytes):
        self.data, self.place, self.entries, self.others = data, 0, 0, 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        start, self.place = self.place, self.place + count
        if self.place > len(self.data):
            raise ValueError(f"it ends, or its header exceeds {HEADER} bytes, inside a value of {count} bytes")
        return self.data[start : self.place]

    def number(self, form: str) -> Any:
        """Return the next number, of a format of `struct`."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self, longest: int, errors: str = "strict") -> str:
        """Return the next string, of at most `longest` bytes."""
        length = self.number("Q")
        if length > longest:
            raise ValueError(f"a string has {length} bytes, more than {longest}")
        return self.take(length).decode(errors=errors)

    def value(self, key: str, kind: int) -> Any:
        """Return the value of a field; a string as text, an array as its length."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text(LONGEST_TEXT, "replace")
        if kind != ARRAY:
            raise ValueError(f"a field is of the unknown type {kind}")
        inner, length = self.number("I"), self.number("Q")
        if inner not in SCALARS and inner != STRING:
            raise ValueError(f"an array holds the unsupported type {inner}")
        least = 8 if inner == STRING else struct.calcsize(SCALARS[inner])
        self.entries += length
        if length * least > len(self.data) - self.place or self.entries > ENTRIES:
            raise ValueError(f"an array claims {length} entries, more than the file or a tokenizer has")
        self.others += 0 if key.startswith(TOKENIZER) else length
        if self.others > OTHERS:
            raise ValueError(f"{key:.80} has {length} entries; arrays outside of {TOKENIZER}* have {OTHERS} at most")
        if inner == STRING:
            self._skip_strings(length)
        else:
            self.take(length * least)
        return length

    def _skip_strings(self, count: int) -> None:
        data, place, length_at = self.data, self.place, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                length = length_at(data, place)[0]
                if length > LONGEST_TEXT:
                    raise ValueError(f"an array of strings has one of {length} bytes, more than {LONGEST_TEXT}")
                place += 8 + length
        except struct.error:  # beyond the data
            raise ValueError("it ends inside an array of strings") from None
        self.place = place
        self.take(0)


def read_header(path: Path) -> Header:
    """Read and validate the header of a GGUF file; ValueError, naming the file, where anything in it is wrong."""
    try:
        with path.open("rb") as file:
            return _header(path, _Reader(file.read(HEADER)), path.stat().st_size)
    except (ValueError, struct.error) as fault:
        raise ValueError(f"{path} cannot be read as GGUF ({fault}); fetch it again") from None


def _header(path: Path, reader: _Reader, size: int) -> Header:
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, tensors, fields = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3")
    if fields > FIELDS or tensors > TENSORS:
        raise ValueError(f"it claims {fields} fields and {tensors} tensors")
    values: dict[str, Any] = {}
    stored: dict[str, bytes] = {}
    for _ in range(fields):
        start = reader.place
        key = reader.text(LONGEST_KEY)
        if key in values:
            raise ValueError(f"the field {key:.80} is there twice")
        values[key] = reader.value(key, reader.number("I"))
        stored[key] = reader.data[start : reader.place]
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}")
    records = tuple(_record(reader, alignment) for _ in range(tensors))
    start = _aligned(reader.place, alignment)
    _check_places(records, size - start)
    return Header(path, version, values, stored, records, alignment, start)


def _record(reader: _Reader, alignment: int) -> Tensor:
    name = reader.text(LONGEST_NAME)
    count = reader.number("I")
    if not 1 <= count <= 4:
        raise ValueError(f"{name} has {count} dimensions")
    dimensions = tuple(reader.number("Q") for _ in range(count))
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in GGML_QUANT_SIZES:
        raise ValueError(f"{name} is of the unknown type {kind}")
    block, size = GGML_QUANT_SIZES[kind]
    if not all(1 <= length <= 1 << 32 for length in dimensions) or dimensions[0] % block:
        raise ValueError(f"{name} has the dimensions {list(dimensions)}, in blocks of {block}")
    if offset % alignment:
        raise ValueError(f"{name} begins at {offset}, not a multiple of {alignment}")
    return Tensor(name, dimensions, kind, offset, prod(dimensions) // block * size)


def _check_places(records: Sequence[Tensor], data: int) -> None:
    """Raise ValueError where tensors share a name or bytes, or do not lie inside the data."""
    if len({record.name for record in records}) < len(records):
        raise ValueError("a tensor is there twice")
    end = 0
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset < end:
            raise ValueError(f"{record.name} overlaps the tensor before it")
        end = record.offset + record.bytes
        if end > data:
            raise ValueError(f"{record.name} ends at {end} of {max(data, 0)} bytes of data: the file is truncated")


def flags(key: str, values: Sequence[bool]) -> bytes:
    """Return the stored bytes of a field that is an array of booleans."""
    name = key.encode()
    begin = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", ARRAY, BOOL, len(values))
    return begin + struct.pack(f"<{len(values)}?", *values)


def join(headers: Sequence[Header], path: Path, added: Sequence[bytes] = ()) -> None:
    """Write the parts of a split GGUF, in order, or a whole one, as one file with further fields as they are stored.

    Raise ValueError unless they are all parts of one model.
    """
    first = headers[0]
    for number, header in enumerate(headers):
        if (header.parts, header.fields.get("split.no", 0)) != (len(headers), number):
            raise ValueError(f"{header.path} is not part {number + 1} of {len(headers)}; give the parts of one model")
        if header.alignment != first.alignment:
            raise ValueError(f"{header.path} is aligned unlike {first.path.name}; give the parts of one model")
    tensors = [tensor for header in headers for tensor in header.tensors]
    expected = first.fields.get("split.tensors.count", len(tensors))
    if len(tensors) != expected or len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError(f"{first.path}: its parts hold {len(tensors)} tensors, not {expected}; fetch them again")
    fields = [stored for key, stored in first.stored.items() if not key.startswith("split.")]
    fields += added
    with path.open("wb") as out:
        out.write(MAGIC + struct.pack("<IQQ", first.version, len(tensors), len(fields)))
        out.writelines(fields)
        offset = 0
        for tensor in tensors:
            name = tensor.name.encode()
            out.write(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.dimensions)))
            out.write(struct.pack(f"<{len(tensor.dimensions)}QIQ", *tensor.dimensions, tensor.kind, offset))
            offset = _aligned(offset + tensor.bytes, first.alignment)
        for header in headers:
            with header.path.open("rb") as file:
                for tensor in header.tensors:
                    out.write(b"\0" * (_aligned(out.tell(), first.alignment) - out.tell()))
                    file.seek(header.start + tensor.offset)
                    _copy(file, out, tensor.bytes)
        out.write(b"\0" * (_aligned(out.tell(), first.alignment) - out.tell()))


def concatenate(pieces: Sequence[Path], path: Path) -> None:
    """Write one file of the pieces that it was cut into, byte for byte."""
    with path.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, out)


def _copy(file: BinaryIO, out: BinaryIO, count: int) -> None:
    while count:
        block = file.read(min(count, BLOCK))
        if not block:
            raise ValueError("a part ends inside a tensor")
        out.write(block)
        count -= len(block)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
