"""Strategies for JSON values and bytes: drawn, mutated and damaged."""

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 10**12, 10**30, -1]),
    st.floats(allow_nan=True, allow_infinity=True),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["gemma2", "qwen3", "gpt2", "bfloat16", "../x", "sliding_attention", "pruned_llama", "yarn", "I8"]),
    st.sampled_from(["\ud800", "a\nb", "</s>", "null", "1e5", "ByteLevel", "WordPiece"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=6,
)


def places_in(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Yield the place of everything inside a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*place, key)
        yield from places_in(inner, (*place, key))


@st.composite
def mutated(draw, value: Any, values: st.SearchStrategy = VALUES) -> Any:
    """Draw a JSON value in which one to three entries are replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        places = list(places_in(value))
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        holder = value
        for step in above:
            holder = holder[step]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            holder[key] = draw(values)
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(values)
        else:
            holder.append(draw(values))
    return value


@st.composite
def damaged(draw, content: bytes, header: int) -> bytes:
    """Draw bytes in which the first `header` bytes are changed in some places, or which end early."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(header, len(data)) - 1))
        action = draw(st.sampled_from(["bit", "byte", "number", "insert", "delete", "truncate"]))
        if action == "bit":
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "byte":
            data[place] = draw(st.integers(0, 255))
        elif action == "number":
            data[place : place + 8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
        elif action == "insert":
            data[place:place] = draw(st.binary(max_size=16))
        elif action == "delete":
            del data[place : place + draw(st.integers(1, 16))]
        else:
            del data[place:]
        if not data:
            break
    return bytes(data)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutated_text(value: Any) -> st.SearchStrategy[bytes]:
    """Draw the text of a JSON value that is mutated, or damaged in its bytes."""
    content = as_json(value)
    return st.one_of(mutated(value).map(as_json), mutated(value).map(as_json), damaged(content, len(content)))
