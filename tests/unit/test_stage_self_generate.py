"""Text that the teacher writes: drawn from its own distribution, the same for any number of ranks, and readable."""

import json
from functools import partial

import pytest
import torch
from tokenizers import AddedToken

from pipeline.data import sources
from pipeline.evaluation.writing import sample, user_turn, word_starts, written
from pipeline.runtime.model_loader import load_tokenizer
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


def test_texts_begin_with_words_or_with_the_users_turn_and_hold_no_special_token():
    tokenizer = byte_tokenizer()
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    assert user_turn(tokenizer, render) == []
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(user_turn(tokenizer, render)) == "<user> "
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
    assert "12 texts of 8 tokens, 0 of 3 batches as chats" in said and len(records) == 12 == len(set(records))
    tokenizer = load_tokenizer(world / "model")
    starts = {tokenizer.decode([id_]).strip() for id_ in word_starts(tokenizer)}
    assert all(any(text.startswith(word) for word in starts) for text in records)
    assert len(list(sources.read(sources.locate(str(path)), "words"))) == 12
    pipeline(*SMALL, "run=two", "data.text_field=words", *settings(world, artifacts=world / "two"), cwd=world, ranks=2)
    assert (world / "runs" / "two" / "generated.jsonl").read_text() == path.read_text()
