"""The files of a tokenizer, bounded before a library reads them.

Readers take time and memory for each entry, and a normalizer or a template may multiply every text.
"""

import base64
import binascii
from collections.abc import Iterator, Sized
from math import prod
from pathlib import Path
from typing import Any

from pipeline.runtime.checkpoint_writer import TOKENIZER
from pipeline.runtime.described import SIZE, check_file, read_mapping

FETCH = "fetch the tokenizer's files again"
FILES = (*TOKENIZER, "special_tokens_map.json", "added_tokens.json")
ENTRIES, OBJECTS = 1 << 21, 1 << 20  # the most entries, and the most arrays or objects, of a file
ADDED = 1 << 15  # the most tokens that one file adds to a vocabulary; each takes a reader 0.1 ms
ADDING = ("added_tokens", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
COUNTED = ("extra_ids", "offset")  # fields by whose value a class adds tokens
BEYOND = 10_000  # entries that a vocabulary may have beyond twice those of the model
CHARACTERS = 1 << 23  # the most of all tokens of a vocabulary
COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
PARTS = 1 << 10  # the most values in one of them
GROWTH = 1 << 10  # the most times that one of them may multiply a text


def check_files(folder: Path, vocabulary: Any) -> None:
    """Raise ValueError, naming it, where a file of a folder's tokenizer is a broken link, damaged or out of bounds.

    `vocabulary` is the number of the model's tokens, if it is a number.
    """
    limit = min(2 * vocabulary + BEYOND, ENTRIES) if isinstance(vocabulary, int) else ENTRIES
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        check_file(path)
        if path.is_file() and path.suffix == ".json":
            _check(path, read_mapping(path, OBJECTS, ENTRIES), limit)
        elif path.is_file() and path.stat().st_size > SIZE:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {SIZE} that are read; {FETCH}")


def _check(path: Path, content: dict[str, Any], limit: int) -> None:
    model = content.get("model")
    tokens = content if path.name.startswith("vocab") else model.get("vocab") if isinstance(model, dict) else None
    if isinstance(tokens, dict | list):
        texts = [token[0] if isinstance(token, list) and token else token for token in tokens]
        length = sum(len(text) for text in texts if isinstance(text, str))
        _bound(path, "its vocabulary", "entries", len(tokens), limit)
        _bound(path, "its vocabulary", "characters", length, CHARACTERS)
    added = {name: content.get(name) for name in ADDING + COUNTED}
    if path.name == "added_tokens.json":
        added["all"] = content
    for name, value in added.items():
        count = value if isinstance(value, int) else len(value) if isinstance(value, Sized) else 0
        _bound(path, name, "tokens", count, ADDED)
    for name in COMPONENTS:
        parts = list(_parts(content.get(name)))
        _bound(path, name, "parts", len(parts), PARTS)
        growth = prod(_growth(part, path) for part in parts if isinstance(part, dict))
        if growth > GROWTH:
            raise ValueError(f"{path}: {name} may multiply a text by more than {GROWTH}; {FETCH}")


def _bound(path: Path, name: str, kind: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"{path}: {name} has {count} {kind}, more than {limit}; {FETCH}")


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value of JSON and all values in it."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _growth(part: dict[str, Any], path: Path) -> int:
    """Return how many times longer a step makes a text at most; it is known by its fields, as `type` may be absent."""
    single, charsmap = part.get("single"), part.get("precompiled_charsmap")
    if "prepend" in part:
        return 1 + len(str(part["prepend"]))
    if "pattern" in part and "content" in part:
        length, pattern = len(str(part["content"])), part["pattern"]
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        # a regular expression may match between all characters
        return max(1, -(-length // len(replaced))) if isinstance(replaced, str) and replaced else 1 + length
    if isinstance(single, list):  # of a template: the places of the text
        return max(1, sum(isinstance(piece, dict) and "Sequence" in piece for piece in single))
    if isinstance(charsmap, str):
        return _longest(charsmap, path)
    return 2 if part.get("type") == "ByteLevel" or "trim_offsets" in part else 1


def _longest(charsmap: str, path: Path) -> int:
    """Return the longest text that a map of SentencePiece puts in place of a character."""
    try:
        data = base64.b64decode(charsmap)
    except binascii.Error as fault:
        raise ValueError(f"{path}: precompiled_charsmap is no base64 ({fault}); {FETCH}") from None
    texts = data[4 + int.from_bytes(data[:4], "little") :]  # after the trie, whose length comes first
    return max(1, *map(len, texts.split(b"\0")))
