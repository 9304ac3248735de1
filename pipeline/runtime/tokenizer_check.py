"""Whether a tokenizer has a vocabulary and belongs to a model, and whether two tokenizers give the same ids."""

from pathlib import Path
from typing import Any

PROBE = (
    "The quick brown fox, 3.14159 x 10^8 m/s!\n\n\tdef f(x): return {'a': [x ** 2, None]}  # naïve café\r\n"
    "Größe, Привет, мир. 你好，世界。 こんにちは 안녕하세요 مرحبا नमस्ते 🙂 \u200b∑ ≤ ½ "
    + "".join(chr(code) for code in range(32, 0x250))
)
TOKENS = 20_000  # of a vocabulary whose text is encoded again
LETTERS = 4  # the fewest ids that the letters of PROBE have in a tokenizer with a vocabulary
WORDS = 64  # the fewest entries of a vocabulary of whole words, which has no letters
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # files, one of which most tokenizers are read from


def check_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Raise ValueError, naming the files that are absent, for a tokenizer without a vocabulary.

    transformers makes such a tokenizer, of special tokens alone, from a tokenizer_config.json that names a class.
    """
    ids = tokenizer("".join(filter(str.isalpha, PROBE)), add_special_tokens=False)["input_ids"]
    found = len(set(ids) - {*tokenizer.all_special_ids, tokenizer.unk_token_id})
    if found >= LETTERS:
        return
    if len(set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys()) < WORDS:
        absent = [name for name in VOCABULARIES if not (folder / name).exists()]
        raise ValueError(
            f"the tokenizer in {folder} has no vocabulary: the letters of a text have {found} ids beside special ones; "
            f"put its files there again (absent: {', '.join(absent) or 'none'})"
        )


def check_fits(tokenizer: Any, vocabulary: int) -> None:
    """Raise ValueError where a text could be given ids that a model of `vocabulary` entries does not have.

    Beyond the vocabulary only added tokens may lie, which no text yields unless it spells them out (packing refuses
    such a text): Gemma 3 has one for images, and some tokenizer classes add an unknown token of their own. The tokens
    that are put around texts must be within.
    """
    added = tokenizer.get_added_vocab()
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
    own = sorted(beyond.keys() - added.keys(), key=lambda token: beyond[token])
    around = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    used = [name for name, number in around.items() if number is not None and number >= vocabulary]
    encoded = max(tokenizer(PROBE)["input_ids"], default=0)
    if own or used or encoded >= vocabulary:
        reason = f"token {own[0]!r:.60} has id {beyond[own[0]]}" if own else f"its {used[0]} has an id beyond them"
        reason = reason if own or used else f"a text is given id {encoded}"
        raise ValueError(
            f"the model has {vocabulary} tokens and the tokenizer {len(tokenizer)}: {reason}; they do not belong "
            "together, give the tokenizer that the model was trained with"
        )


def difference(one: Any, other: Any, vocabulary: int) -> str | None:
    """Return how the ids of two tokenizers differ below `vocabulary`, in one line; None if they do not."""
    first, second = (
        {token: number for token, number in each.get_vocab().items() if number < vocabulary} for each in (one, other)
    )
    if first != second:
        token = min(token for token in first.keys() | second.keys() if first.get(token) != second.get(token))
        ids = [str(vocab.get(token, "none")) for vocab in (first, second)]
        return f"token {token!r:.60} has the id {ids[0]} in one and {ids[1]} in the other"
    ids = sorted(first.values())[:: -(-vocabulary // TOKENS)]
    text = PROBE + one.decode(ids, skip_special_tokens=True)
    encoded = [each(text, add_special_tokens=False)["input_ids"] for each in (one, other)]
    if encoded[0] != encoded[1]:
        place = next((i for i, pair in enumerate(zip(*encoded)) if pair[0] != pair[1]), min(map(len, encoded)))
        return f"they split a text differently, from its token {place} on"
    return None
