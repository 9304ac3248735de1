"""Which part of a text serves which purpose: what is evaluated is read for nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.sources import Corpus, Piece, read


@dataclass(frozen=True)
class Part:
    """The pieces of a corpus that begin in [start, stop) of its characters, as fractions."""

    corpus: Corpus
    start: float
    stop: float

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0.0, 1.0)

    def __str__(self) -> str:
        return self.corpus.given if self.whole else f"{self.corpus.given} from {self.start:.0%} to {self.stop:.0%}"


def assign(corpora: dict[str, Sequence[Corpus]], evaluation: float, calibration: float) -> dict[str, tuple[Part, ...]]:
    """Return the parts of each purpose (calibration, recovery, evaluation), in the order of its corpora.

    A corpus that is evaluated and used otherwise is split: its first share `evaluation` is evaluated, the next share
    `calibration` is for calibration, the rest for recovery. Where only one of these two uses it too, that one has
    all that follows the evaluation. Calibration and recovery share a whole corpus that is not evaluated: the student
    may see both. Raise ValueError where a purpose names a corpus twice, where an evaluated corpus overlaps another
    without being the same, and where a share is empty.
    """
    everything = [(purpose, corpus) for purpose, several in corpora.items() for corpus in several]
    for number, (purpose, corpus) in enumerate(everything):
        for other_purpose, other in everything[:number]:
            if corpus == other and purpose == other_purpose:
                raise ValueError(f"data.{purpose}.path names {corpus.given} twice; name it once, with a larger weight")
            evaluated = (purpose == "evaluation") != (other_purpose == "evaluation")
            if evaluated and corpus != other and not set(corpus.files).isdisjoint(other.files):
                fault = f"data.{purpose}.path {corpus.given} overlaps data.{other_purpose}.path {other.given}"
                raise ValueError(f"{fault}; give the same path, which is then split, or separate ones")

    def part(purpose: str, corpus: Corpus) -> Part:
        users = {user for user, several in corpora.items() if corpus in several}
        return _part(purpose, corpus, users, evaluation, calibration)

    return {purpose: tuple(part(purpose, corpus) for corpus in several) for purpose, several in corpora.items()}


def _part(purpose: str, corpus: Corpus, users: set[str], evaluation: float, calibration: float) -> Part:
    if "evaluation" not in users or len(users) == 1:
        return Part(corpus, 0.0, 1.0)
    edge = evaluation + calibration if len(users) == 3 else evaluation if "recovery" in users else 1.0
    spans = {"evaluation": (0.0, evaluation), "calibration": (evaluation, edge), "recovery": (edge, 1.0)}
    start, stop = spans[purpose]
    if not start < stop:
        raise ValueError(f"data.split leaves {purpose} no part of {corpus.given}; raise its share or give another text")
    return Part(corpus, start, stop)


def passages(part: Part, field: str, tokenizer: Any = None, answers: bool = False) -> Iterator[Piece]:
    """Yield the pieces of a part, contiguous; a document that is cut at the part's edge ends there.

    `answers`: with the spans of the assistant, as `sources.read`.
    """
    pieces = read(part.corpus, field, tokenizer, answers)
    if part.whole:
        yield from pieces
    else:
        total = sum(len(piece.text) for piece in read(part.corpus, field, tokenizer))
        yield from _chosen(_inside(pieces, round(part.start * total), round(part.stop * total)))


def _inside(pieces: Iterable[Piece], start: int, stop: int) -> Iterator[tuple[Piece, bool]]:
    at = 0
    for piece in pieces:
        yield piece, start <= at < stop
        at += len(piece.text)


def _chosen(marked: Iterable[tuple[Piece, bool]]) -> Iterator[Piece]:
    held = None
    for piece, wanted in marked:
        if held is not None:
            yield held if wanted else held._replace(ends=True)
        held = piece if wanted else None
    if held is not None:
        yield held._replace(ends=True)
