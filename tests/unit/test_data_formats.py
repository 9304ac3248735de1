"""A file is read as what it holds, whatever its name, or refused by its name and the record that is at fault."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.sources import check, locate, read

RECORDS = ["First record.\n\nIts second paragraph.", "Second record: é, 漢字.", "Third."]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in RECORDS)
TURNS = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One."}]


class Template:
    """A tokenizer of which only the chat template is used."""

    chat_template = "plain"

    def apply_chat_template(self, turns, tokenize):
        return "".join(f"<{turn['role']}> {turn['content']}\n" for turn in turns)


def texts(path, field="text"):
    corpus = locate(str(path))
    check(corpus, field)
    return [piece.text for piece in read(corpus, field, Template())]


def refused(path, *parts, field="text"):
    """A text is refused in one line that names all the parts, when it is looked at or when it is read."""
    with pytest.raises(ValueError) as fault:
        texts(path, field)
    assert "\n" not in str(fault.value)
    assert all(part in str(fault.value) for part in parts), fault.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonlines", "A.JSONL", "part-00000", "a.txt", "a.log", "a"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_json_lines_are_read_as_such_under_any_name(tmp_path, name, start):
    (tmp_path / name).write_text(start + LINES, encoding="utf-8")
    assert locate(str(tmp_path / name)).kind == "jsonl" and texts(tmp_path / name) == RECORDS


def test_a_first_record_longer_than_what_is_looked_at_is_still_a_record(tmp_path):
    (tmp_path / "part-00000").write_text(json.dumps({"text": "word " * 100_000}) + "\n" + LINES)
    assert texts(tmp_path / "part-00000") == ["word " * 100_000, *RECORDS]


def test_parquet_is_read_as_such_under_any_name(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": RECORDS}), tmp_path / "part-00000")
    assert locate(str(tmp_path / "part-00000")).kind == "parquet" and texts(tmp_path / "part-00000") == RECORDS


@pytest.mark.parametrize(
    "content",
    [
        "{{ braces }} and {more} of them.\n",
        "[1] A reference.\n[2] Another.\n",
        "[a link](address) begins this text.\n",
        '"quoted": not an object\n',
        "{\n  a block of a program\n}\n",
        "[1, 2, 3]\n",
    ],
)
def test_prose_that_begins_like_json_is_prose(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert locate(str(tmp_path / "a.txt")).kind == "text" and "".join(texts(tmp_path / "a.txt")) == content


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "a"}, {"text": "b"}]),
        json.dumps({"data": [{"text": "a"}]}, indent=1),
        json.dumps([{"text": "a"}], indent=1),
        '["a", "b"]\n["c", "d"]\n',
        '[["a"], ["b"]]\n',
    ],
)
def test_other_json_is_refused(tmp_path, content):
    (tmp_path / "part-00000").write_text(content)
    refused(tmp_path / "part-00000", "part-00000", "JSON", ".jsonl")


@pytest.mark.parametrize("head", ["# exported", "[1]", "null", "text"])
@pytest.mark.parametrize("name", ["a.txt", "part-00000"])
def test_json_lines_behind_another_line_are_refused(tmp_path, name, head):
    (tmp_path / name).write_text(f"{head}\n{LINES}")
    refused(tmp_path / name, name, "JSON lines", "line 1 ", head)
    (tmp_path / name).write_text(head + "\n" + json.dumps({"text": "word " * 30_000}) + "\n" + LINES)
    assert locate(str(tmp_path / name)).kind == "text", "one of two lines is no evidence"


@pytest.mark.parametrize("start", ["\n" * 70_000, "\ufeff" + " \n" * 70_000])
def test_json_lines_behind_many_blanks_are_json_lines(tmp_path, start):
    (tmp_path / "a.txt").write_text(start + LINES, encoding="utf-8")
    assert locate(str(tmp_path / "a.txt")).kind == "jsonl" and texts(tmp_path / "a.txt") == RECORDS


def test_json_lines_whose_first_key_is_longer_than_what_is_looked_at_are_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text(json.dumps({"k" * 70_000: 1, "text": "First."}) + "\n" + LINES)
    assert texts(tmp_path / "a.txt") == ["First.", *RECORDS]


def test_json_strings_as_lines_are_refused_and_quoted_prose_is_not(tmp_path):
    (tmp_path / "a.txt").write_text("".join(json.dumps(text) + "\n" for text in RECORDS))
    refused(tmp_path / "a.txt", "a.txt", "JSON string a line", ".jsonl")
    (tmp_path / "a.txt").write_text('"To be."\n"Or not."\n')
    assert locate(str(tmp_path / "a.txt")).kind == "text"


@pytest.mark.parametrize(
    "content",
    [
        '# A page\n\n```\n{"a": 1}\n{"a": 2}\n```\n\nThese are\ntwo lines.\n',
        'x = [\n    {"a": 1},\n    {"a": 2},\n    {"a": 3},\n]\n',
        "if (a)\n{\n}\n{}\n{}\n{}\n",
        '{"quoted: no object, and no further mark\n' + "prose\n" * 20_000,
    ],
)
def test_prose_and_programs_with_json_in_them_are_text(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert locate(str(tmp_path / "a.txt")).kind == "text"


@pytest.mark.parametrize("line", ['{"text": "a", "text": "b"}', '{"text": "a", "more": {"b": 1, "b": 2}}'])
def test_a_key_that_stands_twice_in_an_object_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    refused(tmp_path / "a.jsonl", "a.jsonl:1", "twice")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.parquet", "b"])
@pytest.mark.parametrize("head, word", [(POINTER, "git-lfs"), (b"/annex/objects/SHA256E-s1--0\n", "git-annex")])
def test_a_pointer_in_the_place_of_a_file_is_refused(tmp_path, name, head, word):
    (tmp_path / name).write_bytes(head)
    refused(tmp_path / name, name, word)
    (tmp_path / "a.txt").write_text("Prose.")
    refused(tmp_path, name, word)


def test_what_is_no_file_among_texts_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("Prose.")
    (tmp_path / "b.txt").symlink_to("/nowhere/blob")
    refused(tmp_path, "b.txt", "broken link", "/nowhere/blob")
    refused(tmp_path / "b.txt", "b.txt", "broken link")
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "c")
    refused(tmp_path, "c is no regular file")
    (tmp_path / "c").unlink()
    (tmp_path / "d").symlink_to(tmp_path, target_is_directory=True)
    refused(tmp_path, "d is a link to a folder")
    (tmp_path / "d").unlink()
    (tmp_path / "_SUCCESS").touch()
    assert texts(tmp_path) == ["Prose."]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.zip", "a.tar", "a.jsonl.zst"])
def test_compressed_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES.encode()))
    refused(tmp_path / name, name, "decompress")


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 30_000 + b"bad \xff\n")
    refused(path, "a.txt", "UTF-8", "line 30001")
    path.write_bytes(b"fine\n" * 30_000 + b"bad \0\n")
    refused(path, "a.txt", "NUL", "line 30001")
    path = tmp_path / "b.jsonl"
    path.write_bytes(LINES.encode() + b'{"text": "\xff"}\n')
    refused(path, "b.jsonl:4", "UTF-8")
    path.write_bytes(LINES.encode() + b'{"text": "\\ud800"}\n')
    refused(path, "b.jsonl:4", "ud800")
    path.write_bytes(LINES.encode() + b'{"text": ' + b"[" * 100_000 + b"\n")
    refused(path, "b.jsonl:4", "nested")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_turns_in_a_string_are_turns(tmp_path, kind):
    chats = [json.dumps(TURNS), json.dumps([{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}])]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), path)
    assert check(locate(str(path)), "messages")
    assert texts(path, "messages") == ["<user> Say one.\n<assistant> One.\n", "<user> Hi.\n<assistant> Hello.\n"]


@pytest.mark.parametrize(
    "value, word",
    [
        (json.dumps(TURNS[0]), "single turn"),
        (json.dumps({"messages": TURNS}), "'messages'"),
        (str(TURNS), "Python"),
        (json.dumps([TURNS[0], {"speaker": "bot"}]), "turn 2"),
        (json.dumps({"messages": TURNS, "timestamp": 5}), "'messages'"),
        (json.dumps(json.dumps(TURNS)), "twice"),
        (json.dumps(json.dumps({"messages": TURNS})), "twice"),
        (str([{"name": "a"} | turn for turn in TURNS]), "Python"),
        (json.dumps([{"role": "user", "text": "Hi."}]), "without content"),
        (json.dumps({"chat": [{"from": "human", "text": "Hi."}], "n": 1}), "'chat'"),
    ],
)
def test_chats_in_a_string_that_have_no_single_reading_are_refused(tmp_path, value, word):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}) + "\n")
    refused(tmp_path / "a.jsonl", "a.jsonl:1", word)


@pytest.mark.parametrize(
    "text",
    [
        *('{"a": 1}', '[{"a": 1}]', "[]", "{}", '{"messages": "none"}', '[{"role": broken'),
        *('"a quote"', '"[1]"', '"{braces}"', '[{"role": "Hamlet", "text": "To be."}]', "[{'a': 1}]"),
        *('[{"from": "a@b.org", "text": "Hi."}]', '{"role": "user", "name": "Ann"}', '{"messages": ["a"], "code": 5}'),
    ],
)
def test_other_json_in_a_string_is_text(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert texts(tmp_path / "a.jsonl") == [text]
