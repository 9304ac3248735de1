"""The assistant's text in a rendered chat, for the formats that models publish; what cannot be separated is refused."""

import json

import pytest

from pipeline.data.encoding import Encoder, batches, blocks, frame
from pipeline.data.sources import locate, read
from pipeline.data.templates import ChatTemplate
from pipeline.model.marks import ids_of
from tests.chat_templates import CALL, QWEN3, SPECIAL, TEMPLATES, assistant, user
from tests.tiny_text import byte_tokenizer

TALK = [user("Say 1, é."), assistant("One, é.\n\nAgain"), user("One, é."), assistant("  two\n")]
TALK += [user("3"), assistant("3")]


def talking(template):
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def answers(tokenizer, turns, **options):
    """Return the texts of the assistant's spans."""
    with ChatTemplate(tokenizer) as template:
        text, spans = template.answers(turns, "here", **options)
        assert text == template.render(turns, "here", **options)
    return [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_answers_are_the_assistants_texts_and_what_ends_its_turns(family):
    template, end = TEMPLATES[family]
    trims = "trim" in template
    said = [turn["content"].strip() if trims else turn["content"] for turn in TALK if turn["role"] == "assistant"]
    assert answers(talking(template), TALK) == [text + end for text in said]
    assert answers(talking(template), TALK[:2]) == [said[0] + end]


@pytest.mark.parametrize("family", TEMPLATES)
def test_marked_tokens_decode_to_the_answers(family, tmp_path):
    """Through files and the encoder, whatever is left unmarked: the template's text, users' turns and the end."""
    tokenizer = talking(TEMPLATES[family][0])
    chats = [TALK, TALK[:2], [user("x"), assistant("<think>\nhm\n</think>\n\nwell")]]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    encoder = Encoder(tokenizer, frame(tokenizer), len(tokenizer), marks=True)
    pieces = list(read(locate(str(path)), "messages", tokenizer, answers=True))
    for chat, piece in zip(chats, pieces, strict=True):
        (tokens,) = encoder.encode(batches(blocks([piece])))
        expected = "".join(answers(tokenizer, chat))
        assert tokenizer.decode(tokens[tokens >= 0]).replace(" ", "") == expected.replace(" ", "")
        whole = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        opened = whole[:1] == [tokenizer.bos_token_id]
        assert ids_of(tokens).tolist()[: len(whole) - opened] == whole[opened:]
    assert encoder.counts.answer_tokens and not encoder.counts.edge_tokens


def test_reasoning_and_tool_calls_are_the_assistants():
    tokenizer, call = talking(QWEN3), json.dumps(CALL["function"])
    thoughts = [
        assistant(f"<think>\n{thought}\n</think>\n\n{said}") for thought, said in (("old", "first"), ("new", "last"))
    ]
    thinking = [user("a"), thoughts[0], user("b"), thoughts[1]]
    assert answers(tokenizer, thinking) == ["first<|im_end|>", "<think>\nnew\n</think>\n\nlast<|im_end|>"]
    apart = [user("a"), assistant("last", reasoning_content="new")]
    assert answers(tokenizer, apart) == ["<think>\nnew\n</think>\n\nlast<|im_end|>"]
    calls = [user("2 + 3?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "5"}, assistant("Five.")]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    expected = [f"<tool_call>\n{call}\n</tool_call><|im_end|>", "Five.<|im_end|>"]
    assert answers(tokenizer, calls, tools=tools) == expected
    assert answers(talking(TEMPLATES["llama3"][0]), calls) == [f"{call}<|eot_id|>", "Five.<|eot_id|>"]


UNKNOWN = {
    "the length of an answer before it": "{% for m in messages %}{{ m.content | length }}:{{ m.content }};{% endfor %}",
    "the texts behind all roles": "{% for m in messages %}{{ m.role }} {% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "answers in capitals": "{% for m in messages %}<{{ m.role }}> {{ m.content | upper }}\n{% endfor %}",
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_what_the_renderings_do_not_settle_is_refused(form):
    tokenizer = talking(UNKNOWN[form])
    try:
        found = answers(tokenizer, [user("a"), assistant("bc"), user("d"), assistant("ef")])
    except ValueError as fault:
        assert "here: data.loss_on=assistant" in str(fault) and "\n" not in str(fault)
    else:
        assert [text.strip().lower() for text in found] == ["bc", "ef"], "separated exactly"


@pytest.mark.parametrize("role", ["model", "Assistant", "bot"])
def test_a_role_that_is_no_answer_and_no_known_other_is_refused(role):
    tokenizer = talking("{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}")
    with pytest.raises(ValueError, match=f"here: data.loss_on=assistant .*turn 2 has the role '{role}'") as fault:
        answers(tokenizer, [user("a"), {"role": role, "content": "b"}, user("c"), assistant("d")])
    assert "\n" not in str(fault.value)
