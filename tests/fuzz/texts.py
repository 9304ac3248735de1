"""Targets: text in files of every format, chats and chat templates."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from pipeline.data.chats import FORMS
from pipeline.data.sources import check, locate, read
from pipeline.data.templates import GROWTH, OUTPUT, ChatTemplate
from tests.fuzz import Target
from tests.fuzz.values import damaged
from tests.tiny_text import byte_tokenizer

Case = tuple[str, bytes, str]  # a file's name, its content and data.text_field

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
KEYS = st.sampled_from(["text", "role", "content", "from", "value", "messages"])
RECORDS = st.dictionaries(KEYS | st.text(max_size=5), VALUES | st.text(), max_size=4)
TURN = st.dictionaries(
    st.sampled_from([key for form in FORMS for key in form]), VALUES | st.text(max_size=20), max_size=4
)
NAMES = st.sampled_from(["a.jsonl", "a.ndjson", "part-00000", "a.txt", "a.md"])
LINES = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}).encode(), st.text()),
    st.builds(lambda record: json.dumps(record).encode(), RECORDS),
    st.builds(lambda value: json.dumps(value).encode(), VALUES),
    st.builds(lambda chat: json.dumps({"text": json.dumps(chat)}).encode(), st.lists(TURN, max_size=3)),
    st.binary(max_size=40),
    st.sampled_from([b"", b" ", b"{", b"[[", b'{"text": "a"', b"\xef\xbb\xbf", b"\r", b"[" * 5000]),
    st.just(b'{"text": "\\ud800"}'),
)


class NoTemplate:
    """A tokenizer of which only the chat template is used."""

    chat_template = None


class Files:
    """A folder with one file, which each case replaces."""

    def __init__(self, folder: Path):
        self.folder = folder / "texts"
        self.folder.mkdir()

    def read(self, case: Case) -> list[str]:
        """Return the documents of the file of a case; ValueError names the file."""
        name, content, field = case
        for path in self.folder.iterdir():
            path.unlink()
        (self.folder / name).write_bytes(content)
        try:
            corpus = locate(str(self.folder / name))
            check(corpus, field)
            texts = [""]
            for piece in read(corpus, field, NoTemplate()):
                texts[-1] += piece.text
                if piece.ends:
                    texts.append("")
        except ValueError as fault:
            assert name in str(fault) and len(str(fault)) < 1000, fault
            raise
        return texts

    def target(self, cases: st.SearchStrategy[Case], verify) -> Target:
        def checked(case: Case, texts: list[str]) -> None:
            assert texts[-1] == "", "the last piece ends its document"
            verify(case, texts[:-1])

        return Target(cases, self.read, checked)

    def kind(self, case: Case) -> str:
        return locate(str(self.folder / case[0])).kind


def _any(case: Case, texts: list[str]) -> None:
    assert all(text.strip() for text in texts), "an empty document"


def lines(folder: Path) -> Target:
    """Lines of any content under any name."""
    ends = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"])
    cases = st.builds(
        lambda name, parts, end: (name, end.join(parts), "text"), NAMES, st.lists(LINES, max_size=5), ends
    )
    return Files(folder).target(cases, _any)


def records(folder: Path) -> Target:
    """Sound records that hold anything: every text is read in full, unchanged."""
    files = Files(folder)

    def case(name: str, texts: list[str], ascii_only: bool) -> Case:
        content = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts)
        return name, content.encode(), "text"

    def verify(case: Case, texts: list[str]) -> None:
        rows = [json.loads(line)["text"] for line in case[1].decode().split("\n") if line]
        assert texts == [text for text in rows if text.strip()]

    names = NAMES.filter(lambda name: name != "a.md")
    return files.target(
        st.builds(case, names, st.lists(st.text(min_size=1), min_size=1, max_size=8), st.booleans()), verify
    )


def prose(folder: Path) -> Target:
    """Text with bytes that are none: read unchanged but for blank ends, never with characters replaced or skipped."""
    files = Files(folder)

    def case(name: str, text: str, noise: bytes, place: int) -> Case:
        content = text.encode("utf-8", "surrogatepass")
        return name, content[:place] + noise + content[place:], "text"

    def verify(case: Case, texts: list[str]) -> None:
        if files.kind(case) == "text":
            decoded = case[1].decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            assert "".join(texts).rstrip() == decoded.rstrip() and "\0" not in decoded

    names = st.sampled_from(["a.txt", "a", "notes.md"])
    return files.target(st.builds(case, names, st.text(), st.binary(max_size=8), st.integers(0, 200)), verify)


def parquet(folder: Path) -> Target:
    """Damaged tables."""

    def table(column: dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(column), buffer)
        return buffer.getvalue()

    sound = [
        table({"text": [f"Record {number}, é." for number in range(20)]}),
        table({"text": [[{"role": "user", "content": "a"}]] * 3}),
        table({"text": ["same"] * 50, "id": list(range(50))}),
    ]
    contents = st.sampled_from(sound).flatmap(lambda content: damaged(content, len(content)))
    names = st.sampled_from(["a.parquet", "part-00000", "a.txt"])
    return Files(folder).target(st.builds(lambda name, content: (name, content, "text"), names, contents), _any)


def chats(folder: Path) -> Target:
    """Turns of any content, as values or as JSON in a string; without a template only text is read."""

    def case(turns: list[Any], as_string: bool, field: str) -> Case:
        return "a.jsonl", json.dumps({field: json.dumps(turns) if as_string else turns}).encode() + b"\n", field

    def verify(case: Case, texts: list[str]) -> None:
        value = json.loads(case[1])[case[2]]
        assert texts == ([value] if isinstance(value, str) and value.strip() else []) or not value

    turns = st.lists(TURN | VALUES, min_size=1, max_size=4)
    return Files(folder).target(st.builds(case, turns, st.booleans(), st.sampled_from(["messages", "text"])), verify)


SOUND = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = st.sampled_from(
    [
        "{% for m in messages %}", "{% endfor %}", "{% if loop.first %}", "{% else %}", "{% endif %}",
        "{{ m.content }}", "{{ messages[0]['content'] * 3 }}", "{{ m.role | upper }}",
        "{% set x = 7 %}", "{{ x ** x }}", "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}", "{{ messages[9] }}", "{{ undefined.attribute }}", "{% macro f(a) %}{{ a }}",
        "{% endmacro %}{{ f(1) }}", "{{ namespace(a=1).a }}", "{# a", "#}", "{%- ", " -%}", "{{ 'a' ~ eos_token }}",
        "{{ messages | tojson }}", "{{ ''.__class__ }}", "{% break %}", "{{ strftime_now('%Y') }}",
        "{{ range(99) | list }}",
    ]
)  # fmt: skip


def template(folder: Path) -> Target:
    """Chat templates, sound and damaged ones and parts in any order."""
    content = SOUND.encode()
    changed = damaged(content, len(content)).map(lambda data: data.decode(errors="replace"))
    joined = st.lists(PARTS | st.text(max_size=6), max_size=8).map("".join)
    turns = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One."}]

    def read(case: str) -> str:
        tokenizer = byte_tokenizer_once()
        tokenizer.chat_template = case
        with ChatTemplate(tokenizer) as chat:
            return chat.render(turns, "a.jsonl:1")

    def verify(case: str, text: str) -> None:
        assert isinstance(text, str) and len(text) <= OUTPUT + GROWTH * 100

    held = []

    def byte_tokenizer_once():
        if not held:
            held.append(byte_tokenizer(bos=True))
        return held[0]

    return Target(st.one_of(changed, joined), read, verify)
