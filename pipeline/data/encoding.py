"""From pieces of text to tokens: tokenised in blocks, special tokens between documents, evaluation text kept out."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.answers import Span
from pipeline.data.overlap import EvaluationRuns
from pipeline.data.sources import Piece
from pipeline.model.marks import marked

BLOCK = 1 << 16  # characters tokenised as one string; a longer document is tokenised in parts
BATCH = 1 << 18  # characters given to the tokenizer at once
PARAGRAPH = re.compile(r"\n[ \t]*\n+")  # the end of one


@dataclass(frozen=True)
class Frame:
    """Special tokens around text: `after` each document; `first` in every row where the tokenizer opens with BOS.

    A document that brings them itself, as chats do, has none twice; `closing` is how `after` is written.
    """

    after: int
    first: int | None
    closing: str


def frame(tokenizer: Any) -> Frame:
    """Return what a model expects: EOS after documents (BOS without EOS), and BOS first where its tokenizer adds it.

    Models trained with BOS first (Llama, Gemma) park attention on it: every row begins with it, not just a document.
    """
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is None and begin is None:
        raise ValueError("the tokenizer has neither an EOS nor a BOS token; set eos_token in its tokenizer_config.json")
    opens = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
    after = begin if end is None else end
    return Frame(after, begin if opens else None, tokenizer.convert_ids_to_tokens(after))


@dataclass
class Counts:
    """What a text has, and what was left out of it because evaluation text has it too."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    left_out_pieces: int = 0
    left_out_tokens: int = 0
    answer_tokens: int = 0  # of an assistant, where these are marked
    edge_tokens: int = 0  # partly in an answer, and partly in text beside it that is not blank: not counted as its own


class Block(NamedTuple):
    """Consecutive pieces of one document that are tokenised as one string."""

    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def ends(self) -> bool:
        return self.pieces[-1].ends


def blocks(pieces: Iterable[Piece]) -> Iterator[Block]:
    """Yield paragraphs of documents, and chats whole, joined up to BLOCK characters; longer ones are cut."""
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        for part in _cut(piece):
            if held and size + len(part.text) > BLOCK:
                yield Block(tuple(held))
                held, size = [], 0
            held.append(part)
            size += len(part.text)
            if part.ends:
                yield Block(tuple(held))
                held, size = [], 0


def _without(block: Block, shared: set[int]) -> list[Block | None]:
    """Return what stays of a block without some of its pieces, by number; None for each gap."""
    numbered = groupby(enumerate(block.pieces), lambda each: each[0] not in shared)
    return [Block(tuple(piece for _, piece in group)) if stays else None for stays, group in numbered]


def _cut(piece: Piece) -> Iterator[Piece]:
    """Yield the paragraphs of a piece with the blank lines after them, in parts of at most BLOCK characters."""
    edges = [] if piece.whole else [match.end() for match in PARAGRAPH.finditer(piece.text)]
    edges = [edge for edge in edges if edge < len(piece.text)]
    for start, stop in zip([0, *edges], [*edges, len(piece.text)], strict=True):
        while stop - start > BLOCK:
            space = max(piece.text.rfind(white, start + BLOCK // 2, start + BLOCK) for white in "\n ")
            middle = space if space > start else start + BLOCK
            yield Piece(piece.text[start:middle], False, piece.whole, _inside(piece, start, middle))
            start = middle
        ends = piece.ends and stop == len(piece.text)
        yield Piece(piece.text[start:stop], ends, piece.whole, _inside(piece, start, stop))


def _inside(piece: Piece, start: int, stop: int) -> tuple[Span, ...] | None:
    """Return the answers of a piece within a part of its text, counted from the part's start."""
    if piece.answers is None:
        return None
    cut = ((max(first, start) - start, min(last, stop) - start) for first, last in piece.answers)
    return tuple((first, last) for first, last in cut if first < last)


def batches(several: Iterable[Block]) -> Iterator[list[Block]]:
    """Yield blocks in lists of about BATCH characters."""
    batch, size = [], 0
    for block in several:
        batch.append(block)
        size += sum(len(piece.text) for piece in block.pieces)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Encoder:
    """Turns the blocks of one text into tokens.

    With `notes`, the runs of an evaluation text are noted there. With `avoids`, pieces that share a run with evaluation
    text are left out, with `copies` those alone that are copies, and the gap ends a document; `count` comes first. A
    tokenizer without character offsets loses whole blocks then. With `marks` the tokens of chats that are not an
    assistant's are marked (`marks.marked`).
    """

    def __init__(
        self,
        tokenizer: Any,
        around: Frame,
        vocabulary: int,
        notes: EvaluationRuns | None = None,
        avoids: EvaluationRuns | None = None,
        copies: bool = False,
        marks: bool = False,
    ):
        self.counts, self._marks = Counts(), marks
        self._tokenizer, self._around, self._vocabulary = tokenizer, around, vocabulary
        self._notes, self._avoids, self._copies = notes, avoids, copies
        self._begins = True  # a document
        self._tail = np.empty(0, dtype=np.int64)  # the last tokens, as many as a run can reach back

    def encode(self, several: Iterable[list[Block]]) -> Iterator[np.ndarray]:
        """Yield the tokens, int32, of batches of blocks. Raise ValueError for an id beyond the vocabulary."""
        for batch in several:
            encoded = self._tokenized([block.text for block in batch])
            for number, block in enumerate(batch):
                yield from self._apart(block, encoded, number)
        if self._notes is not None:
            self._notes.finish()

    def count(self, several: Iterable[list[Block]]) -> None:
        """Count, in `avoids`, the pieces of a text that have each run of evaluation text."""
        assert self._avoids is not None
        passed = 0  # pieces before the block
        for batch in several:
            encoded = self._tokenized([block.text for block in batch])
            for number, block in enumerate(batch):
                tokens = self._closed(block, encoded["input_ids"][number])
                joined = self._joined(tokens)
                own = passed + _pieces_of(block, len(tokens), encoded, number, 0)
                self._avoids.count(joined, np.concatenate([np.full(len(self._tail), passed), own]))
                self._extend(tokens)
                passed += len(block.pieces)

    def _tokenized(self, texts: Sequence[str]) -> Any:
        return self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)

    def _joined(self, tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([self._tail, tokens])

    def _extend(self, tokens: np.ndarray) -> None:
        overlap = self._notes or self._avoids
        if overlap is not None:
            self._tail = self._joined(tokens)[-(overlap.length - 1) :]

    def _apart(self, block: Block, encoded: Any, number: int) -> Iterator[np.ndarray]:
        """Yield the tokens of a block, or of those of its pieces that evaluation text does not share."""
        waiting: list[tuple[Block | None, Any, int]] = [(block, encoded, number)]
        while waiting:
            part, encoded, number = waiting.pop()
            if part is None:  # a gap
                yield from self._close()
                continue
            ids = encoded["input_ids"][number]
            skipped = int(self._begins and ids[:1] == [self._around.first])  # every row has it
            tokens = self._closed(part, ids[skipped:])
            shared = self._shared(part, tokens, encoded, number, skipped)
            if not shared:
                yield self._emit(part, tokens, self._counted(part, len(tokens), encoded, number, skipped))
                continue
            self._leave_out(part, shared)
            rest = _without(part, shared)
            waiting += [(each, self._tokenized([each.text]) if each else None, 0) for each in reversed(rest)]

    def _closed(self, block: Block, ids: list[int]) -> np.ndarray:
        """Return the tokens of a block, EOS after a document that does not bring it."""
        closes = block.ends and not block.text.rstrip().endswith(self._around.closing)
        tokens = np.asarray(ids + [self._around.after] if closes else ids, dtype=np.int64)
        if len(tokens) and tokens.max() >= self._vocabulary:
            fault = f"the tokenizer gives id {tokens.max()}, but the model's vocabulary has {self._vocabulary} entries"
            raise ValueError(f"{fault}; model.path needs the tokenizer the model was trained with")
        return tokens

    def _counted(self, block: Block, count: int, encoded: Any, number: int, skipped: int) -> np.ndarray | None:
        """Return which of the `count` tokens of a block a loss counts, [count]; None where it counts all of them."""
        spans, at = [], 0
        for piece in block.pieces:
            own = ((0, len(piece.text)),) if piece.answers is None else piece.answers
            spans += [(at + start, at + stop) for start, stop in own]
            at += len(piece.text)
        if not self._marks or all(piece.answers is None for piece in block.pieces):
            return None
        if encoded.encodings is None:
            raise ValueError(
                "data.loss_on: assistant needs a tokenizer with character offsets, and the teacher's has none; put its "
                "tokenizer.json into the model folder, or set data.loss_on=all"
            )
        edges = np.asarray(encoded.encodings[number].offsets[skipped:], dtype=np.int64).reshape(-1, 2)
        text = block.text
        blank = [(_blanks(text[:start][::-1]), _blanks(text[stop:])) for start, stop in spans]
        starts, stops = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
        before, behind = np.asarray(blank, dtype=np.int64).reshape(-1, 2).T
        touches = (edges[:, :1] < stops) & (np.maximum(edges[:, 1:], edges[:, :1] + 1) > starts)  # [tokens, spans]
        inside = touches & (edges[:, :1] >= starts - before) & (edges[:, 1:] <= stops + behind)
        counted = np.zeros(count, dtype=bool)  # EOS behind a chat that does not bring it is not an assistant's
        counted[: len(edges)] = inside.any(1)
        self.counts.answer_tokens += int(counted.sum())
        self.counts.edge_tokens += int((touches.any(1) & ~inside.any(1)).sum())
        return counted

    def _emit(self, block: Block, tokens: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
        self.counts.documents += block.ends
        self.counts.bytes += sum(len(piece.text.encode()) for piece in block.pieces)
        self.counts.tokens += len(tokens)
        if self._notes is not None:
            self._notes.add(self._joined(tokens))
        self._begins = block.ends
        self._extend(tokens)
        return (tokens if counted is None else marked(tokens, counted)).astype(np.int32)

    def _close(self) -> Iterator[np.ndarray]:
        """End a document whose rest was left out."""
        if not self._begins:
            self._begins = True
            self.counts.documents += 1
            self.counts.tokens += 1
            end = np.asarray([self._around.after], dtype=np.int64)
            self._extend(end)
            yield end.astype(np.int32)

    def _shared(self, block: Block, tokens: np.ndarray, encoded: Any, number: int, skipped: int) -> set[int]:
        """Return the numbers of a block's pieces that share a run with evaluation text."""
        if self._avoids is None:
            return set()
        own = _pieces_of(block, len(tokens), encoded, number, skipped)
        own[len(encoded["input_ids"][number]) - skipped :] = -1  # EOS
        pieces = np.concatenate([np.full(len(self._tail), -1), own])
        shared = self._avoids.shared(self._joined(tokens), pieces, self._copies)
        return set(range(len(block.pieces))) if shared and encoded.encodings is None else shared

    def _leave_out(self, block: Block, shared: set[int]) -> None:
        texts = [block.pieces[number].text for number in sorted(shared)]
        self.counts.left_out_pieces += len(texts)
        self.counts.left_out_tokens += sum(map(len, self._tokenized(texts)["input_ids"]))


def _blanks(text: str) -> int:
    """Return the number of blanks at the beginning of a text."""
    return len(text) - len(text.lstrip())


def _pieces_of(block: Block, count: int, encoded: Any, number: int, skipped: int) -> np.ndarray:
    """Return the number of the piece that each of `count` tokens of a block begins in, [count]; EOS is of the last.

    A tokenizer without character offsets has all its tokens in the first.
    """
    last = len(block.pieces) - 1
    if encoded.encodings is None:
        return np.zeros(count, dtype=np.int64)
    starts = np.asarray([start for start, _ in encoded.encodings[number].offsets[skipped:]], dtype=np.int64)
    edges = np.cumsum([len(piece.text) for piece in block.pieces])
    pieces = np.full(count, last, dtype=np.int64)
    pieces[: len(starts)] = np.searchsorted(edges, starts, side="right").clip(max=last)[:count]
    return pieces
