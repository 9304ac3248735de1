"""Tokens on disk: documents tokenised once, packed into rows of equal length, in memory-mapped shards."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.data.sources import Piece

BLOCK = 1 << 16  # characters tokenised as one string; a longer document goes piece by piece
BATCH = 1 << 20  # characters handed to the tokenizer at once
INDEX = "index.json"


@dataclass(frozen=True)
class Frame:
    """Special tokens around text: `after` each document; `first` in every row where the tokenizer opens with BOS.

    A document that brings them itself, as chats do, has none twice; `closing` is how `after` is written.
    """

    after: int
    first: int | None
    closing: str


@dataclass(frozen=True)
class Domain:
    """A text of a mixture; `weight` is its share of the rows drawn, None in all domains for shares by size."""

    name: str
    pieces: Iterable[Piece]
    weight: float | None


def frame(tokenizer) -> Frame:
    """What a model expects: EOS between documents (BOS without EOS), and BOS in front where its tokenizer adds it.

    Models trained with BOS in front (Llama, Gemma) park attention on it: every row begins with it, not just a document.
    """
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is None and begin is None:
        raise ValueError("the tokenizer has neither an EOS nor a BOS token; set eos_token in its tokenizer_config.json")
    opens = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
    after = begin if end is None else end
    return Frame(after, begin if opens else None, tokenizer.convert_ids_to_tokens(after))


def build(
    folder: Path,
    domains: Sequence[Domain],
    tokenizer,
    around: Frame,
    sequence: int,
    vocabulary: int,
    shard_bytes: int,
    progress: Callable[[Iterable, int | None, str], Iterable],
) -> dict:
    """Tokenise and pack domains into `folder`, one after the other, and give its index.

    Rows are int32 [sequence]; what is left of a domain after its last whole row is dropped. The index is written last,
    so a folder with one is whole. Holds one shard and a batch of BATCH characters in memory. ValueError where a domain
    has not one row, or the tokenizer gives an id that the model's `vocabulary` has no row for.
    """
    folder.mkdir(parents=True)
    shards = _Shards(folder, sequence, max(1, shard_bytes // (4 * sequence)))
    entries = []
    for domain in domains:
        counts = {"documents": 0, "bytes": 0, "tokens": 0}
        start = shards.rows
        batches = _batches(_blocks(domain.pieces))
        tokens = _encoded(progress(batches, None, f"tokens {domain.name}"), tokenizer, around, vocabulary, counts)
        for rows in _rows(tokens, sequence, around.first):
            shards.append(rows)
        if shards.rows == start:
            fault = f"has {counts['tokens']} tokens, fewer than one sequence of {sequence}"
            raise ValueError(
                f"{domain.name} {fault}; give a longer text, a larger share, or a smaller data.sequence_length"
            )
        entries.append({"name": domain.name, "weight": domain.weight, "sequences": shards.rows - start, **counts})
    files = shards.close()
    index = {"sequence": sequence, "sequences": shards.rows, "tokens": shards.rows * sequence}
    index |= {"after": around.after, "first": around.first, "domains": entries, "shards": files}
    unfinished = folder / (INDEX + ".partial")
    unfinished.write_text(json.dumps(index, indent=1))
    unfinished.rename(folder / INDEX)
    return index


def _blocks(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces of one document joined again, up to BLOCK characters."""
    parts, size = [], 0
    for piece in pieces:
        if parts and size + len(piece.text) > BLOCK:
            yield Piece("".join(parts), False)
            parts, size = [], 0
        parts.append(piece.text)
        size += len(piece.text)
        if piece.ends:
            yield Piece("".join(parts), True)
            parts, size = [], 0


def _batches(blocks: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for block in blocks:
        batch.append(block)
        size += len(block.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterable[list[Piece]], tokenizer, around: Frame, vocabulary: int, counts: dict
) -> Iterator[np.ndarray]:
    begins = True  # a document
    for batch in batches:
        texts = [block.text for block in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for block, ids in zip(batch, encoded):
            ids = ids[1:] if begins and ids[:1] == [around.first] else ids  # every row has it
            closes = block.ends and not block.text.rstrip().endswith(around.closing)
            tokens = np.asarray(ids + [around.after] if closes else ids, dtype=np.int64)
            begins = block.ends
            if len(tokens) and tokens.max() >= vocabulary:
                fault = f"the tokenizer gives id {tokens.max()}, but the model's vocabulary has {vocabulary} entries"
                raise ValueError(f"{fault}; model.path needs the tokenizer the model was trained with")
            counts["documents"] += block.ends
            counts["bytes"] += len(block.text.encode())
            counts["tokens"] += len(tokens)
            yield tokens.astype(np.int32)


def _rows(tokens: Iterable[np.ndarray], sequence: int, first: int | None) -> Iterator[np.ndarray]:
    """Whole rows [n, sequence] of a run of tokens, as they fill; `first` opens every row where given."""
    body = sequence if first is None else sequence - 1
    waiting: list[np.ndarray] = []
    count = 0
    for some in tokens:
        waiting.append(some)
        count += len(some)
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
    """A packed folder: `len()` rows, row i as int32 [sequence], read where it lies on disk."""

    def __init__(self, folder: Path):
        """Open a folder that `build` filled; ValueError where it is unfinished or a shard is not of its size."""
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"{self.folder} has no {INDEX}: its packing was not finished; delete the tokens artifact")
        self.index = json.loads((self.folder / INDEX).read_text())
        self.sequence: int = self.index["sequence"]
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
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self._shard(shard)[row - self._ends[shard]]  # a negative index: counted from the shard's end

    def _open(self, shard: int) -> np.ndarray:
        return np.load(self.folder / self.index["shards"][shard]["file"], mmap_mode="r")
