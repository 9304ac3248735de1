"""Malformed texts by the thousand: whatever a file holds, every record is read, or one line names the file at fault.

A long run: PIPELINE_FUZZ_CASES=20000 pytest tests/faults/test_fuzz_data.py
"""

import io
import json
import os
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.data.chats import FORMS
from pipeline.data.sources import check, locate, read

CASES = int(os.environ.get("PIPELINE_FUZZ_CASES", "60"))  # of each test
FUZZ = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="PIPELINE_FUZZ_CASES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)


class Template:
    """A tokenizer of which only the chat template is used, in this process."""

    chat_template = None


def outcome(name: str, content: bytes, field: str = "text") -> list[str] | str:
    """Return the texts of a file, or the one line that refuses it; anything else that is raised fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            corpus = locate(str(path))
            check(corpus, field)
            texts = [""]
            for piece in read(corpus, field, Template()):
                texts[-1] += piece.text
                if piece.ends:
                    texts.append("")
            assert texts.pop() == "", "the last piece ends its document"
            return texts
        except ValueError as fault:
            message = str(fault)
            assert type(fault) is ValueError, f"{type(fault).__name__}: {message}"
            assert "\n" not in message and name in message and len(message) < 1000, message
            return message


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
keys = st.sampled_from(["text", "role", "content", "from", "value", "messages"])
records = st.dictionaries(keys | st.text(max_size=5), values | st.text(), max_size=4)
turn = st.dictionaries(
    st.sampled_from([key for form in FORMS for key in form]), values | st.text(max_size=20), max_size=4
)
names = st.sampled_from(["a.jsonl", "a.ndjson", "part-00000", "a.txt", "a.md"])
lines = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}).encode(), st.text()),
    st.builds(lambda record: json.dumps(record).encode(), records),
    st.builds(lambda value: json.dumps(value).encode(), values),
    st.builds(lambda chat: json.dumps({"text": json.dumps(chat)}).encode(), st.lists(turn, max_size=3)),
    st.binary(max_size=40),
    st.sampled_from([b"", b" ", b"{", b"[[", b'{"text": "a"', b"\xef\xbb\xbf", b"\r", b"[" * 5000]),
    st.just(b'{"text": "\\ud800"}'),
)


@FUZZ
@given(names, st.lists(lines, max_size=5), st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]))
@example("part-00000", [b'{"text": "a"}', b'{"text": 1}'], b"\n")
@example("a.jsonl", [b'{"\\n": ""}'], b"\n")
def test_lines_of_any_content(name, parts, end):
    outcome(name, end.join(parts))


@FUZZ
@given(names.filter(lambda name: name != "a.md"), st.lists(st.text(min_size=1), min_size=1, max_size=8), st.booleans())
def test_every_record_of_a_sound_file_is_read(name, texts, ascii_only):
    """Texts that hold anything are read in full, as they are, unless they hold turns or halves of characters."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts)
    found = outcome(name, content.encode())
    wanted = [text for text in texts if text.strip()]
    assert found == wanted or isinstance(found, str) and not wanted, found


@FUZZ
@given(st.sampled_from(["a.txt", "a", "notes.md"]), st.text(), st.binary(max_size=8), st.integers(0, 200))
def test_prose_is_read_as_it_is_or_refused(name, text, noise, place):
    """What is read is the file, without blank ends; bytes that are no text are never replaced or skipped."""
    content = text.encode("utf-8", "surrogatepass")
    content = content[:place] + noise + content[place:]
    found = outcome(name, content)
    if isinstance(found, list) and locate_kind(name, content) == "text":
        decoded = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        assert "".join(found).rstrip() == decoded.rstrip() and "\0" not in decoded


def locate_kind(name: str, content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        return locate(str(Path(folder) / name)).kind


def table(column) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(column, buffer)
    return buffer.getvalue()


SOUND = [
    table(pyarrow.table({"text": [f"Record {number}, é." for number in range(20)]})),
    table(pyarrow.table({"text": [[{"role": "user", "content": "a"}]] * 3})),
    table(pyarrow.table({"text": ["same"] * 50, "id": list(range(50))})),
]


@FUZZ
@given(
    st.sampled_from(["a.parquet", "part-00000", "a.txt"]),
    st.sampled_from(SOUND),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    st.integers(0, 10_000),
)
def test_damaged_parquet_files(name, sound, flips, cut):
    content = bytearray(sound)
    for place, value in flips:
        content[place % len(content)] = value
    outcome(name, bytes(content[: cut if cut < len(content) else None]))


@FUZZ
@given(st.lists(turn | values, min_size=1, max_size=4), st.booleans(), st.sampled_from(["messages", "text"]))
def test_chats_of_any_turns(chat, as_string, field):
    value = json.dumps(chat) if as_string else chat
    content = json.dumps({field: value}).encode() + b"\n"
    found = outcome("a.jsonl", content, field)
    if isinstance(found, list):  # without a template only text is read
        assert found == ([value] if as_string and value.strip() else []) or not chat
