"""Tokens on disk: documents tokenised once, packed into rows of equal length, in memory-mapped shards."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.encoding import Encoder, Frame, batches, blocks
from pipeline.data.overlap import EvaluationRuns
from pipeline.data.sources import Piece
from pipeline.model.marks import ids_of

INDEX = "index.json"
STRETCH = 1 << 20


@dataclass(frozen=True)
class Domain:
    """A text of a mixture; `weight` is its share of the rows drawn, None in all domains for shares by size."""

    name: str
    pieces: Iterable[Piece]
    weight: float | None


class TooShort(ValueError):
    """A text has not one whole sequence."""

    def __init__(self, name: str, tokens: int, left_out: int, sequence: int):
        self.left_out = left_out  # tokens, as evaluation text shares them
        remedy = "give a longer text, a larger share, or a smaller data.sequence_length"
        shared = f": {left_out} were left out, which evaluation text shares" if left_out else ""
        remedy = "give another text" if left_out else remedy
        super().__init__(f"{name} has {tokens} tokens, fewer than one sequence of {sequence}{shared}; {remedy}")


def build(
    folder: Path,
    domains: Sequence[Domain],
    tokenizer: Any,
    around: Frame,
    sequence: int,
    vocabulary: int,
    shard_bytes: int,
    progress: Callable[[Iterable, int | None, str], Iterable],
    notes: EvaluationRuns | None = None,
    avoids: EvaluationRuns | None = None,
    copies: bool = False,
    marks: bool = False,
) -> dict:
    """Tokenise and pack domains into `folder`, one after the other, and return its index.

    Rows are int32 [sequence]; what is left of a domain after its last whole row is dropped. The index is written last,
    so a folder with one is whole. `notes`, `avoids`, `copies` and `marks` are those of `Encoder`. Memory: one
    shard and a batch of text. Raise ValueError where a domain has not one row (TooShort), or the tokenizer gives an id
    that is not in the model's `vocabulary`.
    """
    folder.mkdir(parents=True)
    shards = _Shards(folder, sequence, max(1, shard_bytes // (4 * sequence)))
    entries = []
    for domain in domains:
        start = shards.rows
        encoder = Encoder(tokenizer, around, vocabulary, notes, avoids, copies, marks)
        tokens = encoder.encode(progress(batches(blocks(domain.pieces)), None, f"tokens {domain.name}"))
        for rows in _rows(tokens, sequence, around.first):
            shards.append(rows)
        counts = encoder.counts
        if shards.rows == start:
            raise TooShort(domain.name, counts.tokens, counts.left_out_tokens, sequence)
        entry = {"name": domain.name, "weight": domain.weight, "sequences": shards.rows - start}
        entries.append(entry | asdict(counts))
    files = shards.close()
    index: dict[str, Any] = {"sequence": sequence, "sequences": shards.rows, "tokens": shards.rows * sequence}
    index |= {"after": around.after, "first": around.first, "marked": marks, "domains": entries, "shards": files}
    unfinished = folder / (INDEX + ".partial")
    unfinished.write_text(json.dumps(index, indent=1), encoding="utf-8")
    unfinished.rename(folder / INDEX)
    return index


def _rows(tokens: Iterable[np.ndarray], sequence: int, first: int | None) -> Iterator[np.ndarray]:
    """Yield whole rows [n, sequence] of tokens, as they fill; `first` opens every row where given."""
    body = sequence if first is None else sequence - 1
    waiting: list[np.ndarray] = []
    count = 0
    for part in tokens:
        waiting.append(part)
        count += len(part)
        if count >= body:
            run = np.concatenate(waiting)
            whole = count // body * body
            rows = run[:whole].reshape(-1, body)
            yield rows if first is None else np.insert(rows, 0, first, axis=1)
            waiting, count = [run[whole:]], count - whole


class _Shards:
    """Numbered .npy files of int32 [rows, sequence], each but the last of `limit` rows."""

    def __init__(self, folder: Path, sequence: int, limit: int):
        self.rows = 0
        self._folder = folder
        self._limit = limit
        self._sequence = sequence
        self._held: list[np.ndarray] = []
        self._held_rows = 0
        self._files: list[dict] = []

    def append(self, rows: np.ndarray) -> None:
        self.rows += len(rows)
        while len(rows):
            room = self._limit - self._held_rows
            self._held.append(rows[:room])
            self._held_rows += len(rows[:room])
            rows = rows[room:]
            if self._held_rows == self._limit:
                self._write()

    def close(self) -> list[dict]:
        if self._held_rows:
            self._write()
        return self._files

    def _write(self) -> None:
        path = self._folder / f"{len(self._files):05}.npy"
        np.save(path, np.concatenate(self._held))
        self._files.append({"file": path.name, "sequences": self._held_rows, "bytes": path.stat().st_size})
        self._held, self._held_rows = [], 0


class Packed:
    """A packed folder: `len()` rows, row i as int32 [sequence], memory-mapped.

    `marked`: rows are stored with marks (`model/marks.py`), which only `stored` returns.
    """

    def __init__(self, folder: Path):
        """Open a folder that `build` filled. Raise ValueError where it is unfinished or a shard has another size."""
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"{self.folder} has no {INDEX}: its packing was not finished; delete the tokens artifact")
        self.index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self.sequence: int = self.index["sequence"]
        self.marked: bool = self.index["marked"]
        self.domains: tuple[dict, ...] = tuple(self.index["domains"])
        for shard in self.index["shards"]:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["bytes"]:
                raise ValueError(f"{path} has {size} bytes, not {shard['bytes']}; delete the tokens artifact")
        self._ends = np.cumsum([shard["sequences"] for shard in self.index["shards"]])
        self._shard = lru_cache(maxsize=256)(self._open)  # each holds a file descriptor

    def __len__(self) -> int:
        return self.index["sequences"]

    def __getitem__(self, row: int) -> np.ndarray:
        return ids_of(self.stored(row)) if self.marked else self.stored(row)

    def stored(self, row: int) -> np.ndarray:
        """Return a row as it is stored, with marks where it has any."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self._shard(shard)[row - self._ends[shard]]  # a negative index: counted from the shard's end

    def stretches(self) -> Iterator[np.ndarray]:
        """Yield the text of consecutive rows, up to STRETCH tokens at once, without the token that opens every row."""
        opened = int(self.index["first"] is not None)
        rows = max(1, STRETCH // self.sequence)
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            yield np.concatenate([self[row][opened:] for row in range(start, stop)])

    def _open(self, shard: int) -> np.ndarray:
        return np.load(self.folder / self.index["shards"][shard]["file"], mmap_mode="r")
