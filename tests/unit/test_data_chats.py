"""Chats are what the teacher's template makes of them, no special token twice; a wrong one ends in one clear line."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.packing import Packed
from pipeline.data.sources import check, locate, read
from pipeline.data.templates import template_texts
from pipeline.stages.prepare import tokens
from pipeline.stages.texts import PURPOSES
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import byte_tokenizer, configured, run_tokens

TURN = "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
TEMPLATES = {  # a template that writes no special token, one that ends in EOS and a line end, one that begins with BOS
    "bare": "{% for m in messages %}" + TURN + "<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}",
    "closed": "{% for m in messages %}" + TURN + "<{{ m.role }}> {{ m.content }}{{ eos_token }}\n{% endfor %}",
    "opened": "{{ bos_token }}{% for m in messages %}" + TURN + "<{{ m.role }}> {{ m.content }}\n{% endfor %}",
}


@pytest.mark.parametrize("quote", ["'", '"'])
def test_the_texts_of_a_template_are_those_that_it_can_add_to_a_chat(quote):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ QStart\n of Q + turn.role + Q\\nQ + turn.content }}[end]\n"
        "{% endfor %}{% if tools is defined %}{{ Qnever writtenQ }}{% endif %}"
    ).replace("Q", quote)
    texts = template_texts(tokenizer)
    assert texts[0].startswith("Start\n of user\na[end]\nStart\n of assistant\na[end]")
    assert {"Start\n of ", "\n", "[end]\n", "never written", "system", "assistant\n"} <= set(texts)
    tokenizer.chat_template = None
    assert template_texts(tokenizer) == []


def chat_of(number):
    answer = {"role": "assistant", "content": f"{number}" + " again" * (number % 9)}
    return [{"role": "user", "content": f"Say {number}, é."}, answer]


CHATS = [chat_of(number) for number in range(9)]
SHAREGPT = [[{"from": who, "value": t["content"]} for who, t in zip(("human", "gpt"), chat)] for chat in CHATS]


def talking(form="closed"):
    tokenizer = byte_tokenizer(bos=form == "opened")
    tokenizer.chat_template = TEMPLATES[form]
    return tokenizer


def written(path, chats, field="messages"):
    """Chats where the ending of a path says: a .jsonl or a .parquet file, or a folder of a saved data set."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({field: chat}) + "\n" for chat in chats))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({field: chats}), path)
    else:
        datasets.Dataset.from_dict({field: chats}).save_to_disk(path)
    return path


def asking(path, *more):
    return configured(*(f"data.{purpose}.path={path}" for purpose in PURPOSES[:2]), *more)


@pytest.mark.slow
@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
def test_the_tokens_of_chats_are_those_of_the_chat_template(tmp_path, name, form):
    """Rows of a whole `tokens` run; what the template does not write itself stands once between two chats."""
    tokenizer = talking(form)
    path = written(tmp_path / name, [None, *CHATS, []])
    config = asking(path, "data.text_field=messages", "data.sequence_length=16")
    run_tokens(config, tmp_path, tokenizer)
    expected = []
    for chat in CHATS:
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert (ids[0] == tokenizer.bos_token_id) == (form == "opened")
        expected += ids[form == "opened" :] + [tokenizer.eos_token_id] * (form != "closed")
    packed = Packed(tmp_path / "out" / "recovery")
    opened = [[tokenizer.bos_token_id]] * (form == "opened")
    body = 16 - len(opened)
    rows = [sum([*opened, expected[i : i + body]], []) for i in range(0, len(expected) - body + 1, body)]
    assert [packed[i].tolist() for i in range(len(packed))] == rows and len(rows) > 5


def test_sharegpts_spelling_is_the_same_chat(tmp_path):
    tokenizer = talking()
    paths = [written(tmp_path / f"{name}.jsonl", chats) for name, chats in (("a", CHATS), ("b", SHAREGPT))]
    ours, theirs = (list(read(locate(str(path)), "messages", tokenizer)) for path in paths)
    assert ours == theirs


def test_chats_are_split_between_purposes_as_texts_are(tmp_path):
    path = written(tmp_path / "a.parquet", [chat_of(number) for number in range(81)])
    given = [f"data.{purpose}.path={path}" for purpose in PURPOSES]
    record = run_tokens(configured(*given, "data.text_field=messages"), tmp_path, talking())
    assert [part["stop"] for purpose in PURPOSES for part in record["parts"][purpose]] == [0.4, 1.0, 0.1]


FINE, ODD = CHATS[0], [{"role": "user", "content": "Hello."}, {"speaker": "bot", "content": "Yes."}]


@pytest.mark.parametrize(
    "records, match",
    [
        ([FINE, ODD], r":2: column 'messages', turn 2 is {'speaker': 'bot', .*; a turn is {role, content} or {from,"),
        ([[FINE[0], SHAREGPT[0][1]]], r":1: column 'messages', turn 2 is {'from': 'gpt', .* a record are alike"),
        ([[{"role": "user", "content": None}]], r":1: column 'messages', turn 1 is {'role': 'user', 'content': None}"),
        ([["Hello."]], r":1: column 'messages', turn 1 is 'Hello.'; a turn is"),
        ([FINE, "Text."], r":2: column 'messages' holds text, and records before it turns: 'Text.'; give them as two"),
        ([FINE, {"role": "user"}], r":2: column 'messages' holds no text and no turns, but {'role': 'user'}; set"),
        (
            [FINE, [{"role": "critic", "content": "No."}]],
            r":2: column 'messages' holds turns of critic, which the teacher's chat template refuses \(no role c",
        ),
    ],
)
def test_records_that_are_no_chat_are_found_before_any_work(tmp_path, records, match):
    path = written(tmp_path / "a.jsonl", records)
    talking().save_pretrained(save_tiny(tiny_model("llama"), tmp_path / "model"))
    config = asking(path, "data.text_field=messages", f"model.path={tmp_path}/model")
    with pytest.raises(ValueError, match="data.calibration.path: .*a.jsonl" + match) as fault:
        tokens.check(config)
    assert "\n" not in str(fault.value)


def test_a_teacher_without_a_template_is_refused_in_the_check_and_where_its_folder_is_made_only_then(tmp_path):
    path = written(tmp_path / "a.parquet", CHATS)
    match = "data.calibration.path: .*a.parquet row 1: column 'messages' holds turns, and .* has no chat template"
    with pytest.raises(ValueError, match=match):
        run_tokens(asking(path, "data.text_field=messages"), tmp_path)
    assert not list((tmp_path / "out").iterdir()), "found before a text was tokenised"
    with pytest.raises(ValueError, match=match):
        tokens.check(asking(path, "data.text_field=messages", f"model.path={tmp_path}/teacher"))


def test_a_record_that_the_template_refuses_late_is_named_with_its_setting(tmp_path):
    odd = [{"role": "critic", "content": "No."}]  # of a file too long to be read through before
    path = written(tmp_path / "a.jsonl", [[{"role": "user", "content": "Say this. " * 9000}]] * 12 + [odd])
    given = [f"data.recovery.path={path}", "data.text_field=messages"]
    with pytest.raises(ValueError, match=r"^data.recovery.path: .*a.jsonl:13: column 'messages' holds turns of crit"):
        run_tokens(configured(*given), tmp_path, talking())


def test_columns_and_files_that_do_not_go_together_are_refused(tmp_path):
    path = written(tmp_path / "a.jsonl", CHATS)
    with pytest.raises(ValueError, match="has no column 'text' but messages; set data.text_field to the one that"):
        check(locate(str(path)), "text")
    (tmp_path / "b.jsonl").write_text('{"messages": "A text."}\n')
    with pytest.raises(ValueError, match="mixes files of text and of turns; give them as two paths"):
        check(locate(str(tmp_path)), "messages")
    odd = written(tmp_path / "c.parquet", [[{"speaker": "bot", "content": "Yes."}]])
    with pytest.raises(ValueError, match="c.parquet: column 'messages' holds no text and no turns, but list<"):
        check(locate(str(odd)), "messages")
