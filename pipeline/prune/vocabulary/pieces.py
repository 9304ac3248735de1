"""The pieces of a tokenizer's model: which of them any text needs, what a piece is made from, and a model of fewer.

All is read from the `model` section of a tokenizer.json. A text keeps its pieces when others are removed if all of
them keep theirs (`parts`): BPE then makes the same merges in the same order, and Unigram's best segmentation is still
among those that are possible.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline.model.token_ids import Renumbering

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # pieces of a model with byte fallback
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # in place of a space in SentencePiece; bytes would not become a space again


class BytePairs:
    """The pieces of a BPE model."""

    def __init__(self, model: Mapping[str, Any]):
        self.model = model
        self.ids: dict[str, int] = model["vocab"]
        self.unknown: str | None = model.get("unk_token")
        self._falls_back = bool(model.get("byte_fallback"))
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""
        self._ranks = {pair: rank for rank, pair in enumerate(map(merge_of, model["merges"]))}
        self._names = {number: piece for piece, number in self.ids.items()}

    def always(self) -> set[int]:
        """Return the ids without which some text would have no pieces: bytes, or all symbols; and the unknown one."""
        kept = _alphabet(self.ids, self._falls_back, self._is_symbol)
        return kept | ({self.ids[self.unknown]} if self.unknown in self.ids else set())

    def parts(self, token: int) -> set[int]:
        """Return the ids of the pieces that BPE makes on its way to a token, the token included.

        A token that BPE does not make of its own text comes as a whole word only, and has no other parts.
        """
        if token not in self._names:
            return {token}
        symbols = self._symbols(self._names[token])
        made = set(symbols)
        while len(symbols) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in zip(symbols, symbols[1:])]
            place = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[place] == len(self._ranks):
                return {token}
            symbols[place : place + 2] = [self._joined(symbols[place], symbols[place + 1])]
            made.add(symbols[place])
        if symbols != [self._names[token]] or not made <= self.ids.keys():
            return {token}
        return {self.ids[piece] for piece in made}

    def renumbered(self, new: Renumbering) -> dict[str, Any]:
        """Return the model with the kept pieces, and the merges whose parts and result are kept."""
        vocab = {piece: place for piece, number in self.ids.items() if (place := new.get(number)) is not None}
        merges = [
            merge
            for merge, (first, second) in zip(self.model["merges"], map(merge_of, self.model["merges"]))
            if first in vocab and second in vocab and self._joined(first, second) in vocab
        ]
        return {**self.model, "vocab": vocab, "merges": merges}

    def _joined(self, first: str, second: str) -> str:
        return first + second.removeprefix(self._prefix)

    def _symbols(self, piece: str) -> list[str]:
        """Return what BPE begins with: the characters of a piece, with the marks of their place in a word."""
        inner = piece.removeprefix(self._prefix)
        body = inner.removesuffix(self._suffix)
        symbols = [self._prefix + character for character in body]
        if symbols and inner == piece:
            symbols[0] = body[0]
        if symbols and body != inner:
            symbols[-1] += self._suffix
        return symbols

    def _is_symbol(self, piece: str) -> bool:
        return self._symbols(piece) == [piece]


class Unigram:
    """The pieces of a Unigram model, whose segmentation needs no piece but those of the result."""

    def __init__(self, model: Mapping[str, Any]):
        self.model = model
        self.ids: dict[str, int] = {piece: number for number, (piece, _) in enumerate(model["vocab"])}
        self._scores = [score for _, score in model["vocab"]]
        self._unknown: int | None = model.get("unk_id")
        self._falls_back = bool(model.get("byte_fallback"))

    def always(self) -> set[int]:
        """Return the ids without which some text would have no pieces: bytes, or all characters; the unknown one.

        And the piece of the lowest score, from which the score of unknown characters follows.
        """
        kept = _alphabet(self.ids, self._falls_back, lambda piece: len(piece) == 1)
        lowest = {self._scores.index(min(self._scores))}
        return kept | lowest | (set() if self._unknown is None else {self._unknown})

    def parts(self, token: int) -> set[int]:
        """Return the token alone."""
        return {token}

    def renumbered(self, new: Renumbering) -> dict[str, Any]:
        """Return the model with the kept pieces. Raise ValueError for pieces beyond the model's vocabulary."""
        kept = [entry for number, entry in enumerate(self.model["vocab"]) if new.get(number) is not None]
        if len(self.model["vocab"]) > new.old:
            raise ValueError("the tokenizer has pieces beyond the model's vocabulary; give the tokenizer of the model")
        unknown = None if self._unknown is None else new[self._unknown]
        return {**self.model, "vocab": kept, "unk_id": unknown}


Pieces = BytePairs | Unigram
MODELS: dict[str, Callable[[Mapping[str, Any]], Pieces]] = {"BPE": BytePairs, "Unigram": Unigram}


def pieces_of(document: Mapping[str, Any]) -> Pieces:
    """Return the pieces of a tokenizer.json; ValueError for a model that is neither BPE nor Unigram."""
    kind = document["model"].get("type")
    if kind not in MODELS:
        raise ValueError(f"the tokenizer's model is {kind}; only {' and '.join(MODELS)} can lose pieces")
    return MODELS[kind](document["model"])


def merge_of(merge: str | Iterable[str]) -> tuple[str, ...]:
    """Return the two pieces of a merge, which tokenizer.json writes as a list or joined by a space."""
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def _alphabet(ids: Mapping[str, int], falls_back: bool, is_symbol: Callable[[str], bool]) -> set[int]:
    if falls_back and all(byte in ids for byte in BYTES):
        return {ids[piece] for piece in (*BYTES, SPACE) if piece in ids}
    return {number for piece, number in ids.items() if is_symbol(piece)}
