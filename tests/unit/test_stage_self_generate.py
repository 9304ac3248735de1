"""Text that the teacher writes: drawn from its own distribution, the same for any number of ranks, and readable."""

import json
import shutil

import pytest
import torch
from tokenizers import AddedToken

from pipeline.data import sources
from pipeline.data.written_chats import ChatMarks, before_user, chat_marks
from pipeline.evaluation.writing import TurnIds, sample, sample_chats, word_starts, written
from pipeline.runtime.model_loader import load_tokenizer
from pipeline.runtime.records import record_text
from pipeline.stages.prepare import self_generate
from tests.chat_templates import SPECIAL, TEMPLATES
from tests.composing import validated
from tests.students import machine
from tests.tiny import tiny_model
from tests.tiny_text import byte_tokenizer
from tests.world import make_world, pipeline, settings

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
SMALL = ("recipe=generate", "self_generate.tokens=96", "self_generate.length=8", "self_generate.batch_size=4")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("generate"))


def test_draws_have_the_models_own_distribution():
    """Of 20 000 draws each share is within four standard errors; at little heat all are the likeliest."""
    model, count = tiny_model("llama", vocab_size=16), 20_000
    start = torch.full((count, 1), 3)
    with torch.no_grad():
        logits = model(input_ids=start[:1]).logits[0, -1]
    for temperature in (1.0, 2.0):
        wanted = torch.softmax(logits / temperature, -1)
        drawn = sample(model, start, 1, temperature, torch.Generator().manual_seed(0))
        shares = drawn.flatten().bincount(minlength=16) / count
        assert ((shares - wanted).abs() < 4 * (wanted * (1 - wanted) / count).sqrt() + 1e-9).all()
    assert (sample(model, start[:50], 1, 1e-4, torch.Generator().manual_seed(1)) == logits.argmax()).all()


def test_every_token_is_drawn_from_what_stands_before_it():
    """Without heat a drawn sequence is the greedy continuation, cache and all."""
    model = tiny_model("llama")
    ids = sample(model, torch.tensor([[5, 9]]), 6, 1e-6, torch.Generator().manual_seed(0))
    whole = torch.tensor([[5, 9]])
    for token in ids[0]:
        with torch.no_grad():
            assert int(model(input_ids=whole).logits[0, -1].argmax()) == int(token)
        whole = torch.cat([whole, token.view(1, 1)], 1)


TURNS = TurnIds(between=(3, 7, 5), after=(4, 9), special=frozenset((2, 3, 4, 7)))


def turns_of(row):
    """Return the user's words and the reply of a row that has both ends; None of another."""
    if 3 not in row:
        return None
    words, rest = row[: row.index(3)], row[row.index(3) :]
    return (words, rest[3:-2]) if rest[:3] == [3, 7, 5] and rest[-2:] == [4, 9] else None


def test_a_row_of_a_chat_has_its_turns_as_the_template_writes_them_and_ends_with_them():
    model = tiny_model("llama", vocab_size=16)
    starts = torch.full((400, 1), 6)
    rows = sample_chats(model, starts, TURNS, 24, 1.0, torch.Generator().manual_seed(0))
    chats = [found for found in map(turns_of, rows) if found]
    assert len(chats) > 10
    assert not any(id_ in TURNS.special for chat in chats for turn in chat for id_ in turn)
    for row in rows:
        drawn = [*row]
        if 3 in row:
            del drawn[row.index(3) + 1 : row.index(3) + 3]
        ends = [place for place, id_ in enumerate(drawn) if id_ in TURNS.special][: 2 if 3 in row else 1]
        ended = len(ends) == (2 if drawn[ends[0]] == 3 else 1) if ends else False
        assert turns_of(row) or (ends[-1] == len(drawn) - 1 if ended else len(row) == 24)


def test_a_row_is_drawn_from_its_own_history_though_others_have_left():
    """Without heat each row is the greedy continuation of its own start, with the template's tokens in their place."""
    model = tiny_model("llama", vocab_size=16)
    starts = torch.arange(16)[:, None]
    rows = sample_chats(model, starts, TURNS, 12, 1e-6, torch.Generator().manual_seed(0))
    assert len({len(row) for row in rows}) > 1, "no row left the batch"
    for start, row in zip(starts.tolist(), rows, strict=True):
        copied = [row.index(3) + 1, row.index(3) + 2] if 3 in row else []
        if row[-2:] == [4, 9]:
            copied.append(len(row) - 1)
        for place, id_ in enumerate(row):
            with torch.no_grad():
                likeliest = model(input_ids=torch.tensor([[*start, *row[:place]]])).logits[0, -1].argmax()
            assert place in copied or id_ == int(likeliest)


def test_turns_without_special_tokens_at_their_ends_are_not_seen_at_the_token():
    assert TURNS.marked
    assert not TurnIds((5, 3), (4,), TURNS.special).marked
    assert not TurnIds((3,), (5,), TURNS.special).marked


def test_texts_begin_with_words_or_with_the_users_turn_and_hold_no_special_token():
    tokenizer = byte_tokenizer()
    assert before_user(tokenizer, "here") == []
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(before_user(tokenizer, "here")) == "<user> "
    ids = tokenizer("One.", add_special_tokens=False)["input_ids"]
    assert written([*ids, tokenizer.eos_token_id, *ids], tokenizer) == "One.\n\nOne."
    tokenizer.add_tokens([AddedToken("<turn>", special=True)])  # special, and no name of the tokenizer's
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert turn not in tokenizer.all_special_ids
    assert written([*ids, turn, *ids], tokenizer) == "One.\n\nOne."


def test_the_line_writes_text_that_can_be_calibrated_on_whatever_the_ranks(world):
    said = pipeline(*SMALL, "run=text", "data.text_field=words", *settings(world), cwd=world).stdout
    path = world / "runs" / "text" / "generated.jsonl"
    records = [json.loads(line)["words"] for line in path.read_text().splitlines()]
    assert "stage 2 of 2, self_generate" in said, "no text is read"
    assert "12 texts of up to 8 tokens, 0 of 3 batches as chats" in said and len(records) == 12 == len(set(records))
    tokenizer = load_tokenizer(world / "model")
    starts = {tokenizer.decode([id_]).strip() for id_ in word_starts(tokenizer)}
    assert all(any(text.startswith(word) for word in starts) for text in records)
    assert len(list(sources.read(sources.locate(str(path)), "words"))) == 12
    pipeline(*SMALL, "run=two", "data.text_field=words", *settings(world, artifacts=world / "two"), cwd=world, ranks=2)
    assert (world / "runs" / "two" / "generated.jsonl").read_text() == path.read_text()


def test_a_batch_that_was_changed_on_disk_is_written_anew(world, tmp_path):
    words = [word for word in settings(world) if not word.startswith("device.")]
    config = validated(*SMALL, *words, "self_generate.tokens=64", "device.kind=cpu")

    def generated(place, text=None):
        place.mkdir()
        if text is not None:
            (place / "batch-00000.json").write_text(text)
        self_generate.run(config, {"teacher": world / "model"}, place, machine())
        return (place / self_generate.FILE).read_text(), sorted(path.name for path in place.iterdir())

    text, files = generated(tmp_path / "whole")
    sound = record_text({"value": {"texts": ["false"]}})
    assert files == [self_generate.FILE]
    assert generated(tmp_path / "changed", sound.replace("false", "wrong")) == (text, files)
    assert "false" in generated(tmp_path / "sound", sound)[0]


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_chat_that_a_template_writes_is_separated_into_its_turns(family):
    """For every format: what stands before the user's words, and the two turns of what follows."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.chat_template, end = TEMPLATES[family]
    marks, before = chat_marks(tokenizer, "here"), tokenizer.decode(before_user(tokenizer, "here"))
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    whole = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) + "Because."
    assert whole.startswith(before)
    rest = whole.removeprefix(before)
    assert marks.after == (end or "<|user|>")
    assert marks.turns(f"{rest}{marks.after}\nmore") == turns
    assert marks.turns(rest) is None, "the answer has no end"
    assert marks.turns("Why?") is None
    assert marks.turns(f"{marks.special[0]}{rest}{marks.after}") is None, "a special token is no word"


def test_words_of_a_chat_are_neither_empty_nor_hold_what_marks_turns():
    marks = ChatMarks("A", "E", ("<s>",))
    assert marks.turns(" a A b E") == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for text in ("A b E", "a A E", "a <s> A b E", "a A b <s> E", "a A b"):
        assert marks.turns(text) is None, text


def with_template(world, folder, template):
    """Return the folder of a copy of the world's model that has a chat template."""
    shutil.copytree(world / "model", folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.mark.parametrize(
    "ends, tokens, marks", [("'e' if m.role == 'user' else 't'", 1920, ("e", "t")), ("eos_token", 19200, None)]
)
def test_chats_are_written_as_turns_that_recovery_can_read(world, tmp_path, ends, tokens, marks):
    """What a random model draws ends a turn by chance; whatever has both ends is a chat, and nothing else is."""
    ends = "U{% for m in messages %}{{ m.content }}{{ " + ends + " }}{% endfor %}"
    chosen = ("self_generate.form=messages", "self_generate.length=60", f"self_generate.tokens={tokens}")
    given = settings(world, model__path=with_template(world, tmp_path / "model", ends))
    said = pipeline(*SMALL, "run=chats", *chosen, *given, cwd=world).stdout
    records = [json.loads(line)["text"] for line in (world / "runs/chats/generated.jsonl").read_text().splitlines()]
    assert records and f"{len(records)} of them chats" in said
    user, assistant = marks or [load_tokenizer(world / "model").eos_token] * 2
    for turns in records:
        assert [turn["role"] for turn in turns] == ["user", "assistant"]
        assert user not in turns[0]["content"] and assistant not in turns[1]["content"]


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "self_generate.form"),
        ("{% for m in messages %}{{ m.content }}<e>{% endfor %}", "self_generate.form"),
        ("U{% for m in messages %}{{ m.content }}<ends like no drawn text>{% endfor %}", "self_generate.length"),
    ],
)
def test_a_template_or_length_that_ends_no_turn_is_refused(world, tmp_path, template, named):
    given = settings(world, model__path=with_template(world, tmp_path / "model", template))
    failed = pipeline(*SMALL, "run=none", "self_generate.form=messages", *given, cwd=world, check=False)
    assert failed.returncode == 2 and f"error: {named}: " in failed.stdout
