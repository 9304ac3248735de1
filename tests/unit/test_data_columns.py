"""Prompts with completions, instruction sets and tools beside turns are chats, from every kind of file."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.sources import check, locate, read
from tests.chat_templates import CALL, CHATML, QWEN3, assistant, user
from tests.tiny_text import byte_tokenizer

ALPACA = [
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"instruction": "Greet.", "input": "", "output": "Hello."},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def talking(template=CHATML):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def written(path, records):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        datasets.Dataset.from_list(records).save_to_disk(path)
    return locate(str(path))


def texts(corpus, field, tokenizer):
    assert check(corpus, field)
    return [piece.text for piece in read(corpus, field, tokenizer)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
def test_columns_joined_by_plus_are_a_prompt_and_its_completion(name, tmp_path):
    tokenizer = talking()
    found = texts(written(tmp_path / name, ALPACA), "instruction+input+output", tokenizer)
    chats = [[user("Add.\n\n2 and 3"), assistant("5")], [user("Greet."), assistant("Hello.")]]
    assert found == [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]


def test_prompts_may_be_turns_and_a_system_column_is_a_system_turn(tmp_path):
    tokenizer = talking()
    listed = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    corpus = written(tmp_path / "turns.jsonl", [listed])
    expected = tokenizer.apply_chat_template([*listed["prompt"], assistant("d")], tokenize=False)
    assert texts(corpus, "prompt+completion", tokenizer) == [expected]
    corpus = written(tmp_path / "system.jsonl", [{"system": "Be brief.", "prompt": "a", "completion": "b"}])
    chat = [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")]
    assert texts(corpus, "system+prompt+completion", tokenizer) == [tokenizer.apply_chat_template(chat, tokenize=False)]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_beside_turns_reach_the_template(as_text, tmp_path):
    tokenizer = talking(QWEN3)
    chat = [
        user("2 + 3?"),
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "5"},
        assistant("5"),
    ]
    record = {"messages": chat, "tools": json.dumps([TOOL]) if as_text else [TOOL]}
    expected = tokenizer.apply_chat_template([{"content": "", **turn} for turn in chat], tools=[TOOL], tokenize=False)
    assert texts(written(tmp_path / "a.jsonl", [record]), "messages", tokenizer) == [expected]
    (piece,) = read(locate(str(tmp_path / "a.jsonl")), "messages", tokenizer, answers=True)
    said = [piece.text[start:stop] for start, stop in piece.answers]
    assert said[0].startswith("<tool_call>") and said[1] == "5<|im_end|>" and "# Tools" in piece.text


@pytest.mark.parametrize(
    ("record", "field", "match"),
    [
        ({"prompt": "a", "completion": " "}, "prompt+completion", r":1: column 'completion' has no completion"),
        ({"prompt": "a"}, "prompt+completion", r":1 has no column 'completion' but prompt"),
        (
            {"prompt": 3, "completion": "b"},
            "prompt+completion",
            r":1: column 'prompt' holds no text and no turns, but 3",
        ),
        ({"a": "x", "b": [user("y")], "c": "z"}, "a+b+c", r":1: the columns a, b hold turns and text"),
        ({"messages": [user("a")], "tools": "add"}, "messages", r":1: column 'tools' holds no list of tools: 'add'"),
    ],
)
def test_malformed_records_are_refused_by_place(record, field, match, tmp_path):
    corpus = written(tmp_path / "a.jsonl", [record])
    with pytest.raises(ValueError, match=match) as fault:
        list(read(corpus, field, talking()))
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize(
    "template, role",
    [
        ("{% for m in messages %} \n{% endfor %}", "user"),
        ("{% for m in messages %}{{ m.text }}{{ m.role }}\n{% endfor %}", "user"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "assistant"),
    ],
)
def test_a_template_that_does_not_write_what_is_said_is_refused(template, role, answered, tmp_path):
    corpus = written(tmp_path / "a.jsonl", [{"messages": [user("What?"), assistant("This.")]}])
    with pytest.raises(ValueError, match="a.jsonl:1: .*chat template") as fault:
        list(read(corpus, "messages", talking(template), answers=answered))
    assert answered or f"no content of the role {role!r}" in str(fault.value)


@pytest.mark.parametrize("content", ["m.content | upper", "m.content.split() | join('\n')", "m.content | trim"])
def test_a_template_may_change_blanks_and_case(content, tmp_path):
    corpus = written(tmp_path / "a.jsonl", [{"messages": [user(" What is\nthis? "), assistant("<think>a</think>b")]}])
    template = "{% for m in messages %}<{{ m.role }}>{{ " + content + " }}{% endfor %}"
    assert list(read(corpus, "messages", talking(template)))
