"""Which tokens remain: those that a text uses most, with all that they are made from."""

from collections.abc import Iterable, Sequence

from pipeline.prune.vocabulary.pieces import Pieces


def kept_tokens(pieces: Pieces, counts: Sequence[int], always: Iterable[int], size: int) -> tuple[int, ...]:
    """Return the ids of `size` tokens that remain, ascending; all tokens where there are no more.

    `counts`: how often each token of the model occurs in a text; the most frequent remain, of equally frequent ones
    those of the lowest ids, which were learned first. A token remains only with its parts. `always`: ids that remain
    whatever their count, beside those that any text needs; ids beyond the model's are passed over. Raise ValueError
    where these are more than `size`.
    """
    kept: set[int] = set()
    for token in (*always, *pieces.always()):
        if 0 <= token < len(counts):
            kept |= pieces.parts(token)
    size = min(size, len(counts))
    if len(kept) > size:
        raise ValueError(
            f"budget.vocabulary: {size} tokens, fewer than the {len(kept)} that always remain (bytes or characters, "
            "added tokens, those of the chat template); raise it"
        )
    order = sorted(range(len(counts)), key=lambda token: -counts[token])
    for token in order:
        if len(kept) == size:
            break
        if token not in kept:
            parts = pieces.parts(token) - kept
            if len(kept) + len(parts) <= size:
                kept |= parts
    unused = (token for token in order if token not in kept)
    kept |= {token for _, token in zip(range(size - len(kept)), unused)}
    return tuple(sorted(kept))
